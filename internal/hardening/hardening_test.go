package hardening

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// The tests harden a child process and look at what the kernel says of it.
const childEnv = "HARDENING_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "limited":
		// As a user without rights: what cannot be done is told, and nothing breaks.
		if err := dropRights(); err != nil {
			fmt.Println("drop:", err)
			os.Exit(1)
		}
	case "scrub":
		scrubChild()
		return
	}
	child()
}

func dropRights() error {
	limit := unix.Rlimit{Cur: 8 << 20, Max: 8 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err
	}
	if os.Getuid() != 0 {
		return nil
	}
	return unix.Setuid(65534)
}

func child() {
	for _, w := range Process() {
		fmt.Println("warning:", w)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Println("dumpable:", dumpable, err)
	// Memory allocated later is locked as well, and there is enough of it.
	big := make([]byte, 64<<20)
	for i := range big {
		big[i] = 1
	}
	for _, file := range []string{"/proc/self/status", "/proc/self/limits"} {
		text, err := os.ReadFile(file)
		if err != nil {
			fmt.Println(err)
		}
		os.Stdout.Write(text)
	}
	out, err := exec.Command("cat", "/proc/self/limits").CombinedOutput()
	fmt.Printf("child's %s %v\n", strings.ReplaceAll(string(out), "\n", "\nchild's "), err)
	os.Exit(0)
}

func runChild(t *testing.T, kind string) map[string]string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+kind)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	facts := make(map[string]string)
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for lines.Scan() {
		line := lines.Text()
		for _, name := range []string{"child's Max core file size", "Max core file size", "dumpable:", "VmLck:", "VmRSS:", "warning:"} {
			if rest, ok := strings.CutPrefix(line, name); ok {
				facts[name] += strings.Join(strings.Fields(rest), " ") + "\n"
			}
		}
	}
	return facts
}

func TestProcess(t *testing.T) {
	facts := runChild(t, "as it is")
	t.Logf("%v", facts)
	if got := facts["dumpable:"]; got != "0 <nil>\n" {
		t.Errorf("dumpable: %q", got)
	}
	for _, whose := range []string{"", "child's "} {
		if got := facts[whose+"Max core file size"]; got != "1 1 bytes\n" {
			t.Errorf("%score limit: %q", whose, got)
		}
	}
	warned := strings.Contains(facts["warning:"], "could not be locked")
	var locked int
	fmt.Sscan(facts["VmLck:"], &locked)
	if (locked > 64<<10) == warned { // KiB
		t.Errorf("%d KiB are locked, warnings: %q", locked, facts["warning:"])
	}
}

func TestProcessWithoutRights(t *testing.T) {
	facts := runChild(t, "limited")
	if !strings.Contains(facts["warning:"], "CAP_IPC_LOCK") {
		t.Errorf("warnings: %q, want one that says what to do", facts["warning:"])
	}
	if got := facts["dumpable:"]; got != "0 <nil>\n" {
		t.Errorf("dumpable: %q", got)
	}
}

func TestSwapsAreNamed(t *testing.T) {
	const text = `Filename				Type		Size		Used		Priority
/dev/dm-1                               partition	999420		0		-2
/dev/zram0                              partition	999420		0		100
/swapfile                               file		2097148		524	-3
`
	if diff := cmp.Diff([]string{"/dev/dm-1", "/swapfile"}, parseSwaps(strings.NewReader(text))); diff != "" {
		t.Error(diff)
	}
	if got := parseSwaps(strings.NewReader("")); got != nil {
		t.Errorf("an empty file names %v", got)
	}
}

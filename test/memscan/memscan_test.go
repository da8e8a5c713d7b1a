package memscan

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// FIPS 197, appendix A.3.
func TestRoundKeysAreThoseOfTheStandard(t *testing.T) {
	key, err := hex.DecodeString("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"round key 0":  "603deb1015ca71be2b73aef0857d7781",
		"round key 1":  "1f352c073b6108d72d9810a30914dff4",
		"round key 2":  "9ba354118e6925afa51a8b5f2067fcde",
		"round key 14": "fe4890d1e6188d0b046df344706c631e",
	}
	for _, k := range roundKeys([32]byte(key)) {
		if w, ok := want[k.form]; ok && hex.EncodeToString(k.key[:]) != w {
			t.Errorf("%s = %x, want %s", k.form, k.key, w)
		}
		delete(want, k.form)
	}
	if len(want) > 0 {
		t.Errorf("not made: %v", want)
	}
}

func newSet(t *testing.T, key []byte, canary string) *Set {
	t.Helper()
	s := &Set{}
	for _, err := range []error{s.AddKey("key", key), s.AddCanary("canary", canary)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func forms(s *Set, p []byte) (found []string) {
	s.search(p, func(n needle, _ int) {
		if !slices.Contains(found, n.form) {
			found = append(found, n.form)
		}
	})
	return found
}

// Each form is found wherever it stands, a page's edge included, and by a part of it.
func TestEveryFormIsFound(t *testing.T) {
	key := make([]byte, 32)
	rand.Read(key)
	const canary = "a canary in its cage"
	s := newSet(t, key, canary)
	wide := bytes.ReplaceAll([]byte(canary), nil, []byte{0})[1:]
	turned := slices.Concat(turnWords([16]byte(key[:16])), turnWords([16]byte(key[16:])))
	for _, tc := range []struct {
		name, form string
		p          []byte
	}{
		{"raw key", "round key 0", key},
		{"raw key's second half", "round key 1", key[16:]},
		{"words turned", "round key 0, words turned", turned},
		{"hexadecimal", "hexadecimal", []byte(hex.EncodeToString(key))},
		{"capitals", "hexadecimal", []byte(strings.ToUpper(hex.EncodeToString(key)))},
		{"base64", "base64", []byte(base64.StdEncoding.EncodeToString(key))},
		{"base64 in a payload", "base64", []byte(base64.StdEncoding.EncodeToString(slices.Concat(make([]byte, 34), key, []byte("x"))))},
		{"base64 for URLs", "base64", []byte(base64.URLEncoding.EncodeToString(append([]byte{9}, key...)))},
		{"canary", "raw", []byte(canary)},
		{"a canary's middle", "raw", []byte(canary[5:13])},
		{"wide canary", "UTF-16", wide},
	} {
		for _, at := range []int{0, 1, 77, pageSize - 9, pageSize - 1, 3*pageSize - len(tc.p)} {
			p := make([]byte, 3*pageSize)
			copy(p[at:], tc.p)
			if !slices.Contains(forms(s, p), tc.form) {
				t.Errorf("%s at %d: found %v", tc.name, at, forms(s, p))
			}
		}
	}
	other := make([]byte, 1<<20)
	rand.Read(other)
	if found := forms(s, other); len(found) > 0 {
		t.Errorf("in random bytes: %v", found)
	}
}

// holderEnv makes this program one that holds what the test looks for.
const holderEnv = "MEMSCAN_TEST_HOLDS"

func TestMain(m *testing.M) {
	if os.Getenv(holderEnv) != "" {
		hold()
		return
	}
	os.Exit(m.Run())
}

// hold has a key expanded and a canary in each kind of memory, until its input says to wipe them.
// What it was told, it was told in a form that is not looked for: each byte inverted.
func hold() {
	secret := make([]byte, 32+20)
	if _, err := os.Stdin.Read(secret); err != nil {
		panic(err)
	}
	for i := range secret {
		secret[i] = ^secret[i]
	}
	block, err := aes.NewCipher(secret[:32])
	if err != nil {
		panic(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	clear(secret[:32]) // the schedules stay
	fd, err := unix.MemfdCreate("held", 0)
	if err != nil {
		panic(err)
	}
	if _, err := unix.Pwrite(fd, secret[32:], 123456); err != nil {
		panic(err)
	}
	shared, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	copy(shared[77777:], secret[32:])
	fmt.Println("holding")
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		panic(err)
	}
	clear(shared)
	clear(secret)
	if err := unix.Ftruncate(fd, 0); err != nil {
		panic(err)
	}
	wipe(block)
	wipe(gcm)
	fmt.Println("wiped")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the test ends
}

// A process of its own holds them: they are found in each place, and are not found after.
func TestAProcessIsSearched(t *testing.T) {
	testenv.NeedRoot(t)
	secret := make([]byte, 32+20)
	rand.Read(secret)
	copy(secret[32:], hex.EncodeToString(secret[40:]))
	set := newSet(t, secret[:32], string(secret[32:]))
	cmd := exec.Command(os.Args[0])
	cmd.Dir = t.TempDir()
	// A signal has the kernel save the registers, with what was last copied, on a stack.
	cmd.Env = append(os.Environ(), holderEnv+"=1", "GODEBUG=asyncpreemptoff=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := proc.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	told := bytes.Clone(secret)
	for i := range told {
		told[i] = ^told[i]
	}
	tell(t, in, out, told, "holding\n")
	processes := Processes(cmd.Dir)
	if len(processes) != 1 || processes[0].PID != cmd.Process.Pid {
		t.Fatalf("Processes = %v, want %d", processes, cmd.Process.Pid)
	}
	before := Scanner{Set: set}
	if err := before.ScanAll(processes); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"whole schedule": true, "/memfd:": true, "/dev/zero": true, "anonymous": true}
	for _, h := range before.Hits {
		for w := range want {
			if strings.Contains(h.Mapping, w) || w == "whole schedule" && h.Form == "round key 0" && h.Runs >= 15 {
				delete(want, w)
			}
		}
	}
	if len(want) > 0 || before.Found()["key"] == 0 || before.Found()["canary"] == 0 {
		t.Errorf("not found while held: %v; found %v", want, before.Hits)
	}
	for _, u := range before.Unread {
		t.Errorf("not searched: %s", u)
	}
	tell(t, in, out, []byte("x"), "wiped\n")
	after := Scanner{Set: set}
	if err := after.ScanAll(processes); err != nil {
		t.Fatal(err)
	}
	for _, h := range after.Hits {
		t.Errorf("after it was wiped: %v", h)
	}
	t.Logf("SHOW: %d hits while held, %d after; %d MiB searched", len(before.Hits), len(after.Hits), after.Bytes>>20)
}

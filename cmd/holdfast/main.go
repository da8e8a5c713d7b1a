// Command holdfast is every role of Holdfast, a whole cluster in one process (`up`), and
// the operator's tools.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/hardening"
)

func main() { os.Exit(run()) }

// run returns the program's exit status.
func run() int {
	if slices.ContainsFunc(os.Args[1:], holdsKeys) {
		if err := hardening.ClobberFreed(); err != nil { // it goes on in this process if it works
			fmt.Fprintln(os.Stderr, "holdfast: freed memory keeps what was in it until it is used again:", err)
		}
	}
	endProfile, err := startProfile()
	if err != nil {
		fmt.Fprintln(os.Stderr, "holdfast:", err)
		return 1
	}
	defer endProfile()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	if err := root.ExecuteContext(ctx); err != nil {
		var exit *exitError
		if errors.As(err, &exit) {
			if exit.err != nil {
				fmt.Fprintln(os.Stderr, "holdfast:", exit.err)
			}
			return exit.status
		}
		fmt.Fprintln(os.Stderr, "holdfast:", err)
		return 1
	}
	return 0
}

// holdsKeys tells the names of commands whose process holds keys or plaintext.
func holdsKeys(command string) bool {
	return slices.Contains([]string{"up", "keymgr", "safekeeper", "pageserver", "manager", "compute"}, command)
}

// startProfile writes a CPU profile of this process into the folder that HOLDFAST_PROFILE
// names: function names and times, nothing of what is worked on.
func startProfile() (end func(), err error) {
	dir := os.Getenv("HOLDFAST_PROFILE")
	if dir == "" {
		return func() {}, nil
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("cpu-%d.pprof", os.Getpid())))
	if err != nil {
		return nil, fmt.Errorf("HOLDFAST_PROFILE: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() {
		pprof.StopCPUProfile()
		if err := f.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "holdfast: writing the CPU profile:", err)
		}
	}, nil
}

// exitError ends the program with a status of its own.
type exitError struct {
	status int
	err    error // printed unless nil
}

func (e *exitError) Error() string { return fmt.Sprintf("exit status %d: %v", e.status, e.err) }
func (e *exitError) Unwrap() error { return e.err }

// newGroup is a command that only holds others: without one of them, or with a word that
// is none of them, it says what there is.
func newGroup(name, short string) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			var names []string
			for _, c := range cmd.Commands() {
				names = append(names, c.Name())
			}
			have := strings.Join(names, ", ")
			if len(args) == 0 {
				return fmt.Errorf("%s needs one of: %s", name, have)
			}
			return fmt.Errorf("%s does not know %q; it knows: %s", name, args[0], have)
		},
	}
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "PostgreSQL storage under the customer's own key",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().String("data", "data", "folder that holds the cluster, one folder per role")
	root.AddCommand(newUp(), newGuard(), newPsql(), newStatus(), newEndpoint(), newBranch(), newKey(), newKMS(), newAudit())
	root.AddCommand(newRoles()...)
	return root
}

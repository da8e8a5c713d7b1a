// Command holdfast is every role of Holdfast, a whole cluster in one process (`up`), and
// the operator's tools.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	if err := root.ExecuteContext(ctx); err != nil {
		var exit *exitError
		if errors.As(err, &exit) {
			if exit.err != nil {
				fmt.Fprintln(os.Stderr, "holdfast:", exit.err)
			}
			os.Exit(exit.status)
		}
		fmt.Fprintln(os.Stderr, "holdfast:", err)
		os.Exit(1)
	}
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
	root.AddCommand(newUp(), newPsql(), newStatus(), newEndpoint(), newKMS())
	root.AddCommand(newRoles()...)
	return root
}

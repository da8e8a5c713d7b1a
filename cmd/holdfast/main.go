// Command holdfast is every role of Holdfast, a whole cluster in one process (`up`), and
// the operator's tools.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
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

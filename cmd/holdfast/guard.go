package main

import (
	"fmt"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/leaseguard"
)

const guardCommand = "guard"

// processGuard is the one guard of this process, of all key rings in it. It ends with the
// process. Without one this process must not hold a lease, so it ends if the guard is lost.
var processGuard = sync.OnceValues(func() (*leaseguard.Guard, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return leaseguard.Start(leaseguard.Config{Command: []string{exe, guardCommand}, Stderr: os.Stderr, Lost: func(err error) {
		fmt.Fprintln(os.Stderr, "holdfast:", err)
		os.Exit(1)
	}})
})

// newGuard is for this program alone: see internal/leaseguard.
func newGuard() *cobra.Command {
	return &cobra.Command{
		Use: guardCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			const page, role = 3, 4 // descriptors, as leaseguard.Start passes them
			return leaseguard.Run(page, role)
		},
	}
}

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

// newKMS is the development KMS's console: it works on the KMS's own file and asks no role
// of Holdfast, as a customer's console would not.
func newKMS() *cobra.Command {
	group := newGroup("kms", "The local development KMS, as the customer's own console")
	group.AddCommand(&cobra.Command{
		Use: "list", Short: "List the keys", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			kms, err := openKMS(cmd)
			if err != nil {
				return err
			}
			return printKeys(cmd, kms)
		},
	})
	group.AddCommand(newKMSCreate())
	for _, c := range []struct {
		name, short string
		act         func(*localkms.KMS, string) error
	}{
		{"disable", "Disable a key: nothing under it can be opened any more", (*localkms.KMS).Disable},
		{"enable", "Enable a key again", (*localkms.KMS).Enable},
		{"rotate", "Give a key a new version; what the old ones wrapped still opens", (*localkms.KMS).Rotate},
	} {
		group.AddCommand(&cobra.Command{
			Use: c.name + " [KEY]", Short: c.short, Args: cobra.MaximumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				kms, err := openKMS(cmd)
				if err != nil {
					return err
				}
				key := cmk
				if len(args) == 1 {
					key = args[0]
				}
				if err := c.act(kms, key); err != nil {
					return err
				}
				return printKeys(cmd, kms)
			},
		})
	}
	return group
}

// newKMSCreate makes the KMS for roles that run one by one; `holdfast up` does it by itself.
func newKMSCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create KEY", Short: "Make a key, and the development KMS if there is none", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := layoutOf(cmd)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(l.localKMS()), 0o700); err != nil {
				return err
			}
			kms, err := localkms.Open(l.localKMS())
			if err != nil {
				return err
			}
			if err := kms.Create(args[0]); err != nil {
				return err
			}
			return printKeys(cmd, kms)
		},
	}
}

func openKMS(cmd *cobra.Command) (*localkms.KMS, error) {
	l, err := layoutOf(cmd)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(l.localKMS()); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no development KMS in %s: `holdfast up --data %s` makes one", l.dir, l.dir)
	}
	return localkms.Open(l.localKMS())
}

func printKeys(cmd *cobra.Command, kms *localkms.KMS) error {
	keys, err := kms.List()
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "KEY\tSTATE\tVERSION")
	for _, k := range keys {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", k.Name, k.State, k.Version)
	}
	return tw.Flush()
}

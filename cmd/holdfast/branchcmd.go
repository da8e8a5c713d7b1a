package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// branchTimeout bounds making a branch: initdb, its import and an endpoint's start.
const branchTimeout = 10 * time.Minute

func newBranch() *cobra.Command {
	group := newGroup("branch", "List, create and delete branches")
	group.AddCommand(newBranchList(), newBranchCreate(), newBranchDelete())
	return group
}

func newBranchList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List the branches and their endpoints", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withManager(cmd, func(ctx context.Context, m pb.ManagerClient) error {
				list, err := m.ListBranches(ctx, &pb.ListBranchesRequest{})
				switch {
				case err != nil:
					return err
				case asJSON:
					return printJSON(cmd.OutOrStdout(), list)
				}
				return printBranches(cmd.OutOrStdout(), list.Branches)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newBranchCreate() *cobra.Command {
	r := &pb.MakeBranchRequest{}
	var asJSON bool
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a new, empty branch and an endpoint of its name", Args: cobra.ExactArgs(1),
		Long: `Make a new, empty branch, by initdb, and an endpoint of its name, which is started. It is no copy of another branch.

With --own-key the branch has a KEK of its own, under the project's CMK or under --cmk: it can be revoked, resumed and rotated alone
("holdfast key … --branch NAME"). Without it the branch is under its project's key. Which it is cannot be changed later.`,
		Example: `  holdfast branch create reports --own-key
  holdfast psql reports`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Name = args[0]
			if r.Cmk != "" && !r.OwnKey {
				return errors.New("--cmk is of a key of its own: say --own-key too")
			}
			return withManagerFor(cmd, branchTimeout, func(ctx context.Context, m pb.ManagerClient) error {
				b, err := m.CreateBranch(ctx, r)
				switch {
				case err != nil:
					return err
				case asJSON:
					return printJSON(cmd.OutOrStdout(), b)
				}
				return printBranches(cmd.OutOrStdout(), []*pb.ManagedBranch{b})
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&r.Project, "project", "", "id of the project (default: the only one)")
	flags.BoolVar(&r.OwnKey, "own-key", false, "give the branch a key of its own")
	flags.StringVar(&r.Cmk, "cmk", "", "the CMK of its own key (default: the project's)")
	flags.StringVar(&r.Listen, "listen", "", "HOST:PORT where its endpoint's PostgreSQL listens (default: a free port of 127.0.0.1)")
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newBranchDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME", Short: "Delete a branch, its endpoints and all its data, for good", Args: cobra.ExactArgs(1),
		Long: `Delete a branch, its endpoints and all its data, for good. A key of its own is destroyed last. It needs no key: a branch whose key is
revoked, or whose CMK is gone, can be deleted. Interrupted, it goes on by itself.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withManagerFor(cmd, branchTimeout, func(ctx context.Context, m pb.ManagerClient) error {
				if _, err := m.DeleteBranch(ctx, &pb.RemoveBranchRequest{Name: args[0]}); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "branch %s is deleted\n", args[0])
				return err
			})
		},
	}
}

func printBranches(w io.Writer, branches []*pb.ManagedBranch) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "BRANCH\tID\tPROJECT\tKEY\tENDPOINTS")
	for _, b := range branches {
		key := "the project's"
		if b.OwnKey {
			key = "its own"
		}
		var endpoints []string
		for _, e := range b.Endpoints {
			endpoints = append(endpoints, fmt.Sprintf("%s (%s) %s", e.Name, e.State, e.Url))
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", b.Name, b.Id, b.Project, key, strings.Join(endpoints, ", "))
	}
	return tw.Flush()
}

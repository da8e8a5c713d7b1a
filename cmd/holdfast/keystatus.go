package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

func newKeyStatus(f *keyFlags) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show whether the key can be used, since when, and who says so", Args: cobra.NoArgs,
		Long: `Show whether the key can be used, since when, and who says so: all keys, or the one that the flags name.

States:
  active       the last check of the KMS was good; nodes get leases
  grace        the KMS does not answer; leases go on until the time shown
  revoked      the KMS denies the key, or it is held back: nothing under it can be read
  unreachable  the KMS does not answer and the grace is over (or 0): as revoked
  resuming     the KMS says yes again; nodes are taking out leases`,
		Example: `  holdfast key status
  holdfast key status --branch reports --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				list, err := c.status(ctx)
				switch {
				case err != nil:
					return err
				case f.json:
					return printJSON(cmd.OutOrStdout(), list)
				}
				return printKeyStates(cmd.OutOrStdout(), time.Now(), list.Keys)
			})
		},
	}
}

// status gives the keys that the flags name, all without flags.
func (c *keyClient) status(ctx context.Context) (*pb.ListKeysResponse, error) {
	if c.flags.project == "" && c.flags.branch == "" {
		return c.admin.ListKeys(ctx, &pb.ListKeysRequest{})
	}
	ref, err := c.ref(ctx)
	if err != nil {
		return nil, err
	}
	st, err := c.keyState(ctx, ref)
	if err != nil {
		return nil, err
	}
	return &pb.ListKeysResponse{Keys: []*pb.KeyStatusResponse{st}}, nil
}

// keyState asks for one key, which has it checked if what is known is old.
func (c *keyClient) keyState(ctx context.Context, ref *pb.KeyRef) (*pb.KeyStatusResponse, error) {
	return c.keys.KeyStatus(ctx, &pb.KeyStatusRequest{Project: ref.Project, Branch: ref.Branch})
}

// printKeyStates shows one key in full, several as a table.
func printKeyStates(w io.Writer, now time.Time, keys []*pb.KeyStatusResponse) error {
	if len(keys) == 1 {
		return printKeyState(w, now, keys[0])
	}
	return printKeyTable(w, now, keys)
}

// printKeyTable shows a key a line.
func printKeyTable(w io.Writer, now time.Time, keys []*pb.KeyStatusResponse) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "KEY\tSTATE\tHOLDERS\tKEK VERSION\tCMK\tCONTROLLED BY\tWHY")
	for _, k := range keys {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\t%s\t%s\n", k.Key, stateWords(now, k), len(k.Holders), k.KekVersion, k.Cmk, k.ControlledBy, k.ProviderError)
	}
	return tw.Flush()
}

// stateWords is a key's state with its times.
func stateWords(now time.Time, k *pb.KeyStatusResponse) string {
	words := k.State
	if k.SinceUnixMs != 0 {
		words += " since " + moment(now, k.SinceUnixMs)
	}
	if k.State == pb.KeyGrace && k.UntilUnixMs != 0 {
		words += ", until " + moment(now, k.UntilUnixMs)
	}
	return words
}

// moment is a time with how far away it is.
func moment(now time.Time, unixMS int64) string {
	t := time.UnixMilli(unixMS)
	d := now.Sub(t)
	text := t.UTC().Format("2006-01-02 15:04:05 UTC")
	if d < 0 {
		return fmt.Sprintf("%s (in %s)", text, rounded(-d))
	}
	return fmt.Sprintf("%s (%s ago)", text, rounded(d))
}

// rounded keeps what a reader needs of a duration.
func rounded(d time.Duration) time.Duration {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond)
	case d < time.Second:
		return d.Round(time.Millisecond)
	case d < time.Minute:
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}

func printKeyState(w io.Writer, now time.Time, k *pb.KeyStatusResponse) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(tw, "%s\t%s\n", name, value)
		}
	}
	line("key", k.Key)
	line("state", stateWords(now, k))
	line("controlled by", k.ControlledBy)
	line("why", k.ProviderError)
	if k.CheckedUnixMs != 0 {
		line("last checked", moment(now, k.CheckedUnixMs))
	}
	line("CMK", k.Cmk)
	line("KEK version", fmt.Sprint(k.KekVersion))
	line("grace", graceWords(k.GraceMs))
	if k.BoundMs != 0 {
		line("bound", fmt.Sprintf("%v from the KMS's first denial until no node can use the key, then the time to kill", rounded(time.Duration(k.BoundMs)*time.Millisecond)))
	}
	if len(k.Holders) == 0 {
		line("held by", "no node")
	}
	if err := tw.Flush(); err != nil || len(k.Holders) == 0 {
		return err
	}
	fmt.Fprintln(tw, "\nHELD BY\tLEASE\tENDS UNLESS RENEWED")
	for _, h := range k.Holders {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", h.Node, h.LeaseId, moment(now, h.EndsUnixMs))
	}
	return tw.Flush()
}

func graceWords(ms int64) string {
	if ms == 0 {
		return "none: if the KMS does not answer, leases run out"
	}
	return fmt.Sprintf("%v if the KMS does not answer", time.Duration(ms)*time.Millisecond)
}

func newKeyGrace(f *keyFlags) *cobra.Command {
	return &cobra.Command{
		Use: "grace [DURATION]", Short: "Show or set for how long the key may be used after the KMS stopped answering", Args: cobra.MaximumNArgs(1),
		Long: `Show or set for how long the key may be used after the KMS stopped answering. It is the customer's choice between
going on without their KMS and losing access with it; 0 is allowed. A denial is never waited for.`,
		Example: `  holdfast key grace 5m
  holdfast key grace 0`,
		RunE: func(cmd *cobra.Command, args []string) error {
			grace := time.Duration(-1)
			if len(args) == 1 {
				var err error
				if grace, err = parseGrace(args[0]); err != nil {
					return err
				}
			}
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				ref, err := c.ref(ctx)
				if err != nil {
					return err
				}
				var st *pb.KeyStatusResponse
				if grace < 0 {
					st, err = c.keyState(ctx, ref)
				} else {
					st, err = c.admin.SetGrace(ctx, &pb.SetGraceRequest{Key: ref, GraceMs: grace.Milliseconds()})
				}
				switch {
				case err != nil:
					return err
				case f.json:
					return printJSON(cmd.OutOrStdout(), st)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "grace of key %s: %s\n", st.Key, graceWords(st.GraceMs))
				return err
			})
		},
	}
}

func parseGrace(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is no grace: want a duration such as 90s, 10m, or 0", s)
	}
	return d, nil
}

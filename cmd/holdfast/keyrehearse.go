package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// rehearseTimeout bounds a rehearsal, the customer's own part in it included.
const rehearseTimeout = 30 * time.Minute

func newKeyRehearse(f *keyFlags) *cobra.Command {
	r := &pb.RehearseRequest{}
	cmd := &cobra.Command{
		Use: "rehearse", Short: "Revoke and resume a throwaway branch's key, and print the measured times", Args: cobra.NoArgs,
		Long: `Revoke and resume the key of a throwaway branch, and print the measured times. The branch is new and empty, has a key of its own
under the project's CMK (or under --cmk) and an endpoint; rows are written to it, the key is held back and given back, and what was
acknowledged is looked for. The customer's CMK itself is not touched, and other branches go on: that is checked. All of it is removed
in the end.

With --wait-for-denial the key is not held back by Holdfast: you are asked to disable the CMK in your KMS, and later to enable it again.
Use a CMK made for it (--cmk): disabling the project's own shuts the project.`,
		Example: `  holdfast key rehearse
  holdfast key rehearse --cmk aws-kms:arn:aws:kms:… --wait-for-denial`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(cmd, rehearseTimeout, func(ctx context.Context, c *keyClient) error {
				return c.rehearse(ctx, cmd.OutOrStdout(), r)
			})
		},
	}
	cmd.Flags().StringVar(&r.Cmk, "cmk", "", "CMK of the throwaway branch (default: the project's)")
	cmd.Flags().BoolVar(&r.WaitForDenial, "wait-for-denial", false, "wait for you to disable the CMK in the KMS, instead of holding the key back")
	return cmd
}

func (c *keyClient) rehearse(ctx context.Context, w io.Writer, r *pb.RehearseRequest) error {
	if c.flags.branch != "" {
		return errors.New("a rehearsal makes a branch of its own: leave --branch out")
	}
	ref, err := c.ref(ctx)
	if err != nil {
		return err
	}
	r.Project = ref.Project
	stream, err := c.manager.Rehearse(ctx, r)
	if err != nil {
		return err
	}
	events, err := c.follow(w, stream)
	if c.flags.json {
		return errors.Join(err, printEvents(w, events))
	}
	return errors.Join(err, printMeasures(w, events))
}

// follow tells of each step as it comes.
func (c *keyClient) follow(w io.Writer, stream pb.Manager_RehearseClient) (events []*pb.RehearseEvent, err error) {
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return events, nil
		}
		if err != nil {
			return events, err
		}
		events = append(events, e)
		if e.Step != "" && !c.flags.json {
			fmt.Fprintln(w, e.Step)
		}
		if e.Receipt != nil && !c.flags.json {
			fmt.Fprintln(w)
			if err := printReceipt(w, time.Now(), e.Receipt); err != nil {
				return events, err
			}
			fmt.Fprintln(w)
		}
	}
}

// printMeasures is the table of what was measured.
func printMeasures(w io.Writer, events []*pb.RehearseEvent) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	rows := 0
	for _, e := range events {
		if e.Measure == "" {
			continue
		}
		if rows++; rows == 1 {
			fmt.Fprint(tw, "\nTOOK\t  MEASURED\n")
		}
		fmt.Fprintf(tw, "%v\t  %s\n", rounded(time.Duration(e.TookUs)*time.Microsecond), e.Measure)
	}
	return tw.Flush()
}

// printEvents is {"events": […]}, each as the service tells it.
func printEvents(w io.Writer, events []*pb.RehearseEvent) error {
	list := make([]any, 0, len(events))
	for _, e := range events {
		v, err := jsonOf(e)
		if err != nil {
			return err
		}
		list = append(list, v)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(map[string]any{"events": list})
}

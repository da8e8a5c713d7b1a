package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// receiptMargin is how long a receipt is waited for beyond the bound after which every lease has run out.
const receiptMargin = 10 * time.Second

const revokeWords = `key %s is held back from now on, whatever its KMS says, until "holdfast key resume":
  every node wipes the key and all that it holds under it; PostgreSQL of its endpoints is killed, and connections end;
  new connections are refused; nothing that rests anywhere can be read.
`

func newKeyRevoke(f *keyFlags) *cobra.Command {
	var reason string
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "revoke", Short: "Hold the key back at once, on every node, until `key resume`", Args: cobra.NoArgs,
		Long: `Hold the key back at once, on every node, until "holdfast key resume". Nodes are told, and shred what they hold; a node
that cannot be reached does so when its lease runs out. The receipt, which is waited for, says which node did what and when.
Nothing is lost: every acknowledged commit is there after the resumption.

The hold is Holdfast's own. What the customer can do alone, without Holdfast, is to disable the CMK in their KMS: that is
found out by the next check, or at once through the hook.`,
		Example: `  holdfast key revoke --reason "laptop stolen"
  holdfast key revoke --branch reports`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				return c.revoke(ctx, cmd.OutOrStdout(), reason, wait)
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit log")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait for the receipt (default: until every lease must have run out)")
	return cmd
}

func (c *keyClient) revoke(ctx context.Context, w io.Writer, reason string, wait time.Duration) error {
	ref, err := c.refAtOnce(ctx)
	if err != nil {
		return err
	}
	before, listErr := c.receiptsBefore(ctx, ref)
	st, err := c.admin.RevokeKey(ctx, &pb.RevokeKeyRequest{Key: ref, Reason: reason})
	if err != nil {
		return fmt.Errorf("the key may or may not be held back (%w): `holdfast key status` tells; revoking again is harmless", err)
	}
	if !c.flags.json {
		fmt.Fprintf(w, revokeWords, st.Key)
	}
	if st.State != pb.KeyRevoked {
		return fmt.Errorf("the key manager says that it holds key %s back, and yet that it is %s: disable its CMK in the KMS", st.Key, st.State)
	}
	if listErr != nil {
		return fmt.Errorf("the key is held back; what came of it on the nodes is not known, since its receipts cannot be read: %w", listErr)
	}
	limit := cmp.Or(wait, time.Duration(st.BoundMs)*time.Millisecond+receiptMargin)
	r, err := c.awaitReceipt(ctx, ref, before, limit)
	if err != nil {
		return err
	}
	switch {
	case c.flags.json && r != nil:
		return printJSON(w, r)
	case c.flags.json:
		return printJSON(w, st)
	case r == nil:
		_, err = fmt.Fprintf(w, "done: no node held a lease on the key, so there was nothing to shred\n")
		return err
	}
	fmt.Fprintln(w)
	if err := printReceipt(w, time.Now(), r); err != nil {
		return err
	}
	if !r.Complete {
		return fmt.Errorf("the key is held back, but within %v not every node has answered or has run out of its lease: `holdfast key receipts %s` shows it later", limit, r.Id)
	}
	return nil
}

// receiptsBefore lists the receipts that there are before a revocation, to know its own by. The revocation waits for them no
// longer than this, and does not need them.
func (c *keyClient) receiptsBefore(ctx context.Context, ref *pb.KeyRef) ([]*pb.Receipt, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	list, err := c.admin.ListReceipts(ctx, ref)
	return list.GetReceipts(), err
}

// noReceipt is how long a revocation may take to open its receipt.
const noReceipt = 2 * time.Second

// awaitReceipt waits for a receipt that is not in before until it is complete, and gives what there is of it
// at the end of limit; nil if nobody held a lease.
func (c *keyClient) awaitReceipt(ctx context.Context, ref *pb.KeyRef, before []*pb.Receipt, limit time.Duration) (*pb.Receipt, error) {
	for begun := time.Now(); ; {
		list, err := c.admin.ListReceipts(ctx, ref)
		if err != nil {
			return nil, fmt.Errorf("the key is held back; its receipt cannot be read: %w", err)
		}
		fresh := newest(list.Receipts, before)
		waited := time.Since(begun)
		switch {
		case fresh != nil && (fresh.Complete || waited >= limit):
			return fresh, nil
		case fresh == nil && waited >= min(noReceipt, limit):
			return nil, nil
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return nil, fmt.Errorf("the key is held back; waiting for its receipt: %w", err)
		}
	}
}

// newest is the last receipt that is not in old, or nil.
func newest(list, old []*pb.Receipt) *pb.Receipt {
	var found *pb.Receipt
	for _, r := range list {
		known := slices.ContainsFunc(old, func(o *pb.Receipt) bool { return o.Id == r.Id })
		if !known && (found == nil || r.RevokedUnixUs > found.RevokedUnixUs) {
			found = r
		}
	}
	return found
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// resumeLimit bounds how long a resumption is watched.
const resumeLimit = 15 * time.Second

func newKeyResume(f *keyFlags) *cobra.Command {
	return &cobra.Command{
		Use: "resume", Short: "End the hold of `key revoke`: service comes back by itself", Args: cobra.NoArgs,
		Long: `End the hold of "holdfast key revoke". The KMS is asked at once, and if it says yes nodes take out leases and endpoints start
again by themselves. It cannot enable a key that the customer disabled in their KMS: only they can.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				return c.resume(ctx, cmd.OutOrStdout())
			})
		},
	}
}

// resumed tells whether a key that came back is in use again: by its endpoints, if any are to run. What else holds a lease again
// takes it out when it has something to do. Without endpoints, or without a manager, the state alone tells.
func (c *keyClient) resumed(ctx context.Context, ref *pb.KeyRef, state string) bool {
	branches, err := c.manager.ListBranches(ctx, &pb.ListBranchesRequest{})
	if err != nil {
		return state != pb.KeyResuming
	}
	list, err := c.manager.ListEndpoints(ctx, &pb.ListEndpointsRequest{})
	if err != nil {
		return state != pb.KeyResuming
	}
	found := false
	for _, e := range list.Endpoints {
		if e.Project != ref.Project || !underKey(branches.Branches, ref, e.Branch) || e.State == "stopped" || e.State == "failed" {
			continue
		}
		if found = true; e.State != "running" {
			return false
		}
	}
	return found || state != pb.KeyResuming
}

// underKey tells whether a branch is under the key that a reference names.
func underKey(branches []*pb.ManagedBranch, ref *pb.KeyRef, branch string) bool {
	if ref.Branch != "" {
		return branch == ref.Branch
	}
	return !slices.ContainsFunc(branches, func(b *pb.ManagedBranch) bool { return b.Project == ref.Project && b.Id == branch && b.OwnKey })
}

func comingBack(state string) bool {
	return pb.KeyUsable(state)
}

func (c *keyClient) resume(ctx context.Context, w io.Writer) error {
	ref, err := c.ref(ctx)
	if err != nil {
		return err
	}
	st, err := c.admin.ResumeKey(ctx, ref)
	for begun := time.Now(); err == nil && comingBack(st.State) && time.Since(begun) < resumeLimit && !c.resumed(ctx, ref, st.State); {
		if err = pause(ctx, 100*time.Millisecond); err == nil {
			st, err = c.keyState(ctx, ref)
		}
	}
	switch {
	case err != nil:
		return err
	case c.flags.json:
		return printJSON(w, st)
	}
	if err := printKeyState(w, time.Now(), st); err != nil {
		return err
	}
	if st.State == pb.KeyRevoked || st.State == pb.KeyUnreachable {
		return fmt.Errorf("the hold is ended, but the KMS does not let key %s be used; it resumes by itself when %s says yes", st.Key, cmp.Or(st.ControlledBy, "the KMS"))
	}
	return nil
}

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/receipt"
)

func newKeyReceipts(f *keyFlags) *cobra.Command {
	var verify bool
	var audit string
	cmd := &cobra.Command{
		Use: "receipts [ID]", Short: "Show what came of each revocation, by node", Args: cobra.MaximumNArgs(1),
		Long: `Show what came of each revocation: which process wiped which keys, when, and what else it dropped, signed by the process;
and for a process that did not answer when its lease had run out. Without an ID the receipts are listed, the newest first.

--verify checks each report's signature, and that it was made with the key that the process had asked for its lease with; it names
the processes whose shredding no signature proves, since they did not answer. Receipts are in the bucket; with --audit each one that
is complete is also compared with what the audit log says of it, so that none that was changed or made up passes.`,
		Example: `  holdfast key receipts
  holdfast key receipts 5f0c2a… --verify
  holdfast key receipts --verify --audit data/keymgr
  holdfast key receipts --json`,
		ValidArgsFunction: f.completeReceipt,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				list, err := c.receipts(ctx, args)
				if err != nil {
					return err
				}
				if err := showReceipts(cmd.OutOrStdout(), list, f.json, len(args) == 1); err != nil || !verify && audit == "" {
					return err
				}
				out := cmd.OutOrStdout()
				if f.json {
					out = io.Discard // the document is all that is printed: the exit status tells
				}
				return verifyReceipts(out, list.Receipts, audit)
			})
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "check the signatures; fails if one is wrong")
	cmd.Flags().StringVar(&audit, "audit", "", "the audit log's folder: compare the receipts with it, too (implies --verify)")
	return cmd
}

// receipts gives the receipts of the key that the flags name, or the one of an id, newest first. Without flags
// an id is looked for among all keys.
func (c *keyClient) receipts(ctx context.Context, id []string) (*pb.ListReceiptsResponse, error) {
	refs, err := c.receiptRefs(ctx, len(id) == 1)
	if err != nil {
		return nil, err
	}
	all := &pb.ListReceiptsResponse{}
	for _, ref := range refs {
		list, err := c.admin.ListReceipts(ctx, ref)
		if err != nil {
			return nil, err
		}
		all.Receipts = append(all.Receipts, list.Receipts...)
	}
	slices.SortFunc(all.Receipts, func(a, b *pb.Receipt) int { return int(b.RevokedUnixUs - a.RevokedUnixUs) })
	all.Receipts = slices.CompactFunc(all.Receipts, func(a, b *pb.Receipt) bool { return a.Id == b.Id })
	if len(id) == 0 {
		return all, nil
	}
	for _, r := range all.Receipts {
		if r.Id == id[0] {
			return &pb.ListReceiptsResponse{Receipts: []*pb.Receipt{r}}, nil
		}
	}
	return nil, fmt.Errorf("there is no receipt %q; `holdfast key receipts` lists them", id[0])
}

func (c *keyClient) receiptRefs(ctx context.Context, anyKey bool) ([]*pb.KeyRef, error) {
	if !anyKey || c.flags.project != "" || c.flags.branch != "" {
		ref, err := c.ref(ctx)
		return []*pb.KeyRef{ref}, err
	}
	list, err := c.admin.ListKeys(ctx, &pb.ListKeysRequest{})
	if err != nil {
		return nil, err
	}
	refs := make([]*pb.KeyRef, 0, len(list.Keys))
	for _, k := range list.Keys {
		refs = append(refs, refOf(k.Key))
	}
	return refs, nil
}

func showReceipts(w io.Writer, list *pb.ListReceiptsResponse, asJSON, full bool) error {
	switch {
	case asJSON:
		return printJSON(w, list)
	case full:
		return printReceipt(w, time.Now(), list.Receipts[0])
	}
	return printReceipts(w, time.Now(), list.Receipts)
}

// verifyReceipts fails if a report is not what the holder of its lease signed. What no signature proves is no failure:
// it is listed. audit, unless empty, is the folder of the audit log to compare with.
func verifyReceipts(w io.Writer, list []*pb.Receipt, audit string) error {
	var sums map[string]string
	if audit != "" {
		var err error
		if sums, err = auditedReceipts(audit); err != nil {
			return err
		}
	}
	var errs []error
	reports := 0
	for _, r := range list {
		errs = append(errs, receipt.Verify(r))
		if audit != "" && r.Complete {
			errs = append(errs, compareWithAudit(r, sums))
		}
		reports += len(r.Entries)
		unproven := receipt.Unproven(r)
		for _, e := range r.Entries {
			if why, ok := unproven[e.LeaseId]; ok {
				reports--
				fmt.Fprintf(w, "not proven: %s in receipt %s: %s\n", e.Node, r.Id, why)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "verified: %d signed reports of %d receipts\n", reports, len(list))
	return err
}

// auditedReceipts gives the SHA-256 of each receipt whose completion is in the audit log, the last one.
func auditedReceipts(dir string) (map[string]string, error) {
	sums := make(map[string]string)
	_, err := readAudit([]string{dir}, nil, func(e keymgr.Event) error {
		if id, sum, ok := keymgr.CompletedReceipt(e); ok {
			sums[id] = sum
		}
		return nil
	})
	return sums, err
}

func compareWithAudit(r *pb.Receipt, sums map[string]string) error {
	data, err := receipt.Marshal(r)
	if err != nil {
		return err
	}
	switch want, ok := sums[r.Id]; {
	case !ok:
		return fmt.Errorf("receipt %s: the audit log does not have it: another key manager's log may, or it was made up", r.Id)
	case want != fmt.Sprintf("%x", sha256.Sum256(data)):
		return fmt.Errorf("receipt %s is not as the audit log has it: it was changed", r.Id)
	}
	return nil
}

func printReceipts(w io.Writer, now time.Time, list []*pb.Receipt) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "no receipts: the key was never revoked while a node held it")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "RECEIPT\tREVOKED\tCAUSE\tPROCESSES\tREPORTED\tSHREDDED AFTER\tCOMPLETE")
	for _, r := range list {
		reported, last := 0, int64(0)
		for _, e := range r.Entries {
			if e.Report != nil {
				reported, last = reported+1, max(last, e.Report.ShreddedUnixUs)
			}
		}
		after := "-"
		if last != 0 {
			after = sinceRevoked(r, last)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d\t%s\t%s\n", r.Id, moment(now, r.RevokedUnixUs/1000), r.Cause, len(r.Entries), reported, after, yesNo(r.Complete))
	}
	return tw.Flush()
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func sinceRevoked(r *pb.Receipt, unixUS int64) string {
	return rounded(time.Duration(unixUS-r.RevokedUnixUs) * time.Microsecond).String()
}

// printReceipt shows one receipt in full.
func printReceipt(w io.Writer, now time.Time, r *pb.Receipt) error {
	fmt.Fprintf(w, "receipt %s: key %s, revoked %s\n", r.Id, r.Key, moment(now, r.RevokedUnixUs/1000))
	fmt.Fprintf(w, "cause: %s", r.Cause)
	if r.Detail != "" {
		fmt.Fprintf(w, ": %s", r.Detail)
	}
	if r.RequestId != "" {
		fmt.Fprintf(w, " (request %s)", r.RequestId)
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\nPROCESS\tKEYS WIPED AFTER\tALL SHREDDED AFTER\tDEKS\tDROPPED")
	var last int64
	for _, e := range r.Entries {
		last = max(last, printEntry(tw, now, r, e))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if r.Complete {
		_, err := fmt.Fprintf(w, "\ncomplete: nothing under the key was held anywhere after %s\n", sinceRevoked(r, max(last, r.RevokedUnixUs)))
		return err
	}
	_, err := fmt.Fprintf(w, "\nnot complete yet\n")
	return err
}

// printEntry shows one process, and gives when it was over with it.
func printEntry(tw io.Writer, now time.Time, r *pb.Receipt, e *pb.ReceiptEntry) (end int64) {
	rep := e.Report
	if rep == nil {
		verb := "ran out"
		if e.LeaseEndUnixUs > now.UnixMicro() {
			verb = "runs out"
		}
		fmt.Fprintf(tw, "%s\tno report\tits lease %s after %s\t-\t-\n", e.Node, verb, sinceRevoked(r, e.LeaseEndUnixUs))
		return e.LeaseEndUnixUs
	}
	fmt.Fprintf(tw, "%s (pid %d)\t%s\t%s\t%d\t%s\n", e.Node, rep.Pid, sinceRevoked(r, rep.KeysWipedUnixUs), sinceRevoked(r, rep.ShreddedUnixUs),
		rep.Keys, strings.Join(rep.Dropped, "; "))
	return rep.ShreddedUnixUs
}

func (f *keyFlags) completeReceipt(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var out []string
	if len(args) == 0 {
		_ = f.with(cmd, completionLimit, func(ctx context.Context, c *keyClient) error { // without an answer there is nothing to offer
			list, err := c.receipts(ctx, nil)
			for _, r := range list.GetReceipts() {
				out = append(out, r.Id)
			}
			return err
		})
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

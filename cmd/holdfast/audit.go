package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/reconcile"
)

// The exit statuses of the audit commands; 1 is any other error.
const (
	exitBroken = 2 // the log is damaged, was changed or was cut off
	exitDiffer = 3 // the logs do not agree
)

func newAudit() *cobra.Command {
	group := newGroup("audit", "Check the key manager's audit log, without any role of a cluster")
	group.AddCommand(newAuditVerify(), newAuditReconcile())
	return group
}

// auditPaths is what is named, or the folder of the cluster's key manager.
func auditPaths(cmd *cobra.Command, args []string) ([]string, error) {
	if len(args) > 0 {
		return args, nil
	}
	l, err := layoutOf(cmd)
	if err != nil {
		return nil, err
	}
	return []string{l.keymgrConfig().Dir}, nil
}

func newAuditVerify() *cobra.Command {
	var expect string
	cmd := &cobra.Command{
		Use:   "verify [DIR | FILE...]",
		Short: "Verify the hash chain of an audit log, with nothing but its files",
		Long: `Verify the hash chain of an audit log, a folder or files in their order (default: the key
manager's of --data), and print what it holds and its head. Whoever may write the log could
cut lines off its end, or write all of it anew: against that note the head elsewhere, and
give it later as --expect-head.

Exit status: 0 the log is whole; 2 it is not; 1 another error.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			paths, err := auditPaths(cmd, args)
			if err != nil {
				return err
			}
			pin, err := parsePin(expect)
			if err != nil {
				return err
			}
			sum, err := readAudit(paths, pin, nil)
			printSummary(cmd.OutOrStdout(), &sum)
			return err
		},
	}
	cmd.Flags().StringVar(&expect, "expect-head", "", "NUMBER:HASH that the log had once and must still have")
	return cmd
}

func parsePin(s string) (*keymgr.Head, error) {
	if s == "" {
		return nil, nil
	}
	h, err := keymgr.ParseHead(s)
	return &h, err
}

// readAudit makes an error of what the files hold, not of reading them, an exit status.
func readAudit(paths []string, pin *keymgr.Head, each func(keymgr.Event) error) (keymgr.Summary, error) {
	sum, err := keymgr.ReadAudit(paths, pin, each)
	var pathErr *os.PathError
	if err != nil && !errors.As(err, &pathErr) {
		return sum, &exitError{status: exitBroken, err: err}
	}
	return sum, err
}

func printSummary(w io.Writer, s *keymgr.Summary) {
	if s.Events == 0 {
		fmt.Fprintln(w, "no events")
		return
	}
	fmt.Fprintf(w, "%d events, %d to %d, %s to %s, by %d key managers\n", s.Events, s.FirstSeq, s.LastSeq,
		s.FirstTime.UTC().Format(time.RFC3339), s.LastTime.UTC().Format(time.RFC3339), s.Instances)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, name := range slices.Sorted(maps.Keys(s.ByEvent)) {
		event, outcome, _ := strings.Cut(name, " ")
		fmt.Fprintf(tw, "  %s\t%s\t%d\n", event, outcome, s.ByEvent[name])
	}
	_ = tw.Flush() // to a terminal or a pipe
	if s.TornBytes > 0 {
		fmt.Fprintf(w, "the last line is unfinished (%d bytes): a crash while it was written; the key manager cuts it off\n", s.TornBytes)
	}
	fmt.Fprintf(w, "head %v\n", s.Head())
}

func newAuditReconcile() *cobra.Command {
	var file, format, since, until string
	cmd := &cobra.Command{
		Use:   "reconcile --log FILE --format FORMAT [DIR | FILE...]",
		Short: "Compare an audit log with the log that the KMS itself keeps",
		Long: `Compare an audit log (default: the key manager's of --data) with an exported log of the
KMS, call by call, by request id. Formats: cloudtrail (log files, or the output of aws
cloudtrail lookup-events), gcp (gcloud logging read --format=json), azure (AuditEvent), vault
(an audit device's file), kmsim. Without --since and --until the time of the KMS's log is
compared, from its first call to its last.

Exit status: 0 the logs agree; 3 they do not; 2 the audit log is damaged; 1 another error.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			paths, err := auditPaths(cmd, args)
			if err != nil {
				return err
			}
			window, err := parseWindow(since, until)
			if err != nil {
				return err
			}
			return runReconcile(cmd.OutOrStdout(), paths, file, format, window)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&file, "log", "", "the KMS's exported log")
	flags.StringVar(&format, "format", "", "its format: "+strings.Join(reconcile.Formats, ", "))
	flags.StringVar(&since, "since", "", "compare from this time on (RFC 3339)")
	flags.StringVar(&until, "until", "", "compare up to this time (RFC 3339)")
	_ = cmd.MarkFlagRequired("log")    // fails only for a flag that is not there
	_ = cmd.MarkFlagRequired("format") // as above
	return cmd
}

func parseWindow(since, until string) (w reconcile.Window, err error) {
	parse := func(name, s string) (t time.Time) {
		if s != "" && err == nil {
			if t, err = time.Parse(time.RFC3339, s); err != nil {
				err = fmt.Errorf("--%s %q: want a time such as 2026-05-01T12:00:00Z", name, s)
			}
		}
		return t
	}
	w = reconcile.Window{Since: parse("since", since), Until: parse("until", until)}
	return w, err
}

func runReconcile(out io.Writer, paths []string, file, format string, w reconcile.Window) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	calls, err := reconcile.Read(format, f)
	if err != nil {
		return fmt.Errorf("reading the KMS's log %s as %s: %w", file, format, err)
	}
	var events []keymgr.Event
	_, err = readAudit(paths, nil, func(e keymgr.Event) error {
		if reconcile.Concerns(format, e.CMK) {
			events = append(events, e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r := reconcile.Compare(events, calls, w)
	printReport(out, r)
	if !r.Clean() {
		return &exitError{status: exitDiffer, err: fmt.Errorf("the logs do not agree: %d calls only in the audit log, %d only in the KMS's, %d with another outcome",
			len(r.OnlyOurs), len(r.OnlyTheirs), len(r.Differ))}
	}
	return nil
}

func printReport(w io.Writer, r *reconcile.Report) {
	for _, part := range []struct {
		title string
		lines []string
	}{
		{"only in the audit log: the KMS's log is not whole, or it is another's", r.OnlyOurs},
		{"only in the KMS's log: somebody else used the key, or the audit log was cut", r.OnlyTheirs},
		{"the outcome differs", r.Differ},
		{"only in the KMS's log, at the time of a call that got no answer", r.Lost},
		{"only in the KMS's log, and refused", r.Refused},
	} {
		if len(part.lines) > 0 {
			fmt.Fprintf(w, "%s:\n  %s\n", part.title, strings.Join(part.lines, "\n  "))
		}
	}
	bound := func(t time.Time) string {
		if t.IsZero() {
			return "open"
		}
		return t.UTC().Format(time.RFC3339)
	}
	fmt.Fprintf(w, "compared from %s to %s: %d calls are in both logs, %d got no answer, %d are outside that time\n",
		bound(r.Window.Since), bound(r.Window.Until), r.Matched, r.Unanswered, r.Outside)
}

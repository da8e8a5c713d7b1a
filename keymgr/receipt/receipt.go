// Package receipt is what a receipt of a revocation says and how it is filled: pure, so that it can
// be verified by anybody who has one.
//
// A receipt lists each lease that lived when the key was revoked, with the public key of the process
// that held it. A process that has shredded signs a report of it (internal/shredreport). A lease
// without a report has run out at the moment that the entry names: past it, what held it gets no key
// and, by its own clock and its guard, has none (invariant K2). A receipt is complete when each
// entry has a report, or its lease has run out.
package receipt

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

// maxEntries bounds a receipt, since reports may add to it.
const maxEntries = 4096

// file is a receipt as it is kept.
type file struct {
	Format  int             `json:"format"`
	Receipt json.RawMessage `json:"receipt"`
}

const fileFormat = 1

// Marshal gives a receipt's file, JSON.
func Marshal(r *pb.Receipt) ([]byte, error) {
	body, err := protojson.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("receipt %s: %w", r.Id, err)
	}
	return json.MarshalIndent(file{fileFormat, body}, "", "  ")
}

// Parse undoes Marshal.
func Parse(data []byte) (*pb.Receipt, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	if f.Format != fileFormat {
		return nil, fmt.Errorf("receipt: format %d, this program reads format %d", f.Format, fileFormat)
	}
	r := &pb.Receipt{}
	if err := protojson.Unmarshal(f.Receipt, r); err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	return r, nil
}

// Entry gives that of a lease, or nil.
func Entry(r *pb.Receipt, lease string) *pb.ReceiptEntry {
	i := slices.IndexFunc(r.Entries, func(e *pb.ReceiptEntry) bool { return e.LeaseId == lease })
	if i < 0 {
		return nil
	}
	return r.Entries[i]
}

// Add puts a verified report into its entry and tells whether that changed the receipt. A lease
// that is not listed, since the key manager that gave it has restarted, gets an entry without a public
// key: who signed that report nobody can tell.
func Add(r *pb.Receipt, report *pb.ShredReport) (bool, error) {
	if report.Key != r.Key {
		return false, fmt.Errorf("the report is of key %.200q, the receipt of %s", report.Key, r.Key)
	}
	e := Entry(r, report.LeaseId)
	switch {
	case e == nil && len(r.Entries) >= maxEntries:
		return false, fmt.Errorf("receipt %s has %d entries already", r.Id, len(r.Entries))
	case e == nil:
		r.Entries = append(r.Entries, &pb.ReceiptEntry{Node: report.Node, LeaseId: report.LeaseId, Branch: report.Branch, Report: report})
		return true, nil
	case e.Report != nil:
		return false, nil // sent again
	case e.Node != report.Node:
		return false, fmt.Errorf("lease %s is of node %q, the report of %q", e.LeaseId, e.Node, report.Node)
	}
	if len(e.PublicKey) > 0 {
		if err := shredreport.VerifyBy(report, e.PublicKey); err != nil {
			return false, err
		}
	}
	e.Report = report
	return true, nil
}

// Complete tells whether each entry has a report, or its lease has run out by now.
func Complete(r *pb.Receipt, nowUS int64) bool {
	return !slices.ContainsFunc(r.Entries, func(e *pb.ReceiptEntry) bool { return e.Report == nil && nowUS < e.LeaseEndUnixUs })
}

// Merge takes into r the reports that other, an earlier or later form of it, has and r lacks. other
// comes out of the bucket, which anybody may have written: a report that does not verify is left there, or
// it would keep the process's own out.
func Merge(r, other *pb.Receipt) {
	for _, o := range other.Entries {
		if o.Report == nil || o.Report.Key != r.Key {
			continue
		}
		if e := Entry(r, o.LeaseId); e == nil && len(r.Entries) < maxEntries && verifyEntry(r, o) == nil {
			r.Entries = append(r.Entries, proto.CloneOf(o))
		} else if e != nil && e.Report == nil {
			_, _ = Add(r, proto.CloneOf(o.Report)) // refused: it is not this process's
		}
	}
}

// Unproven lists the entries whose shredding no signed report of the lease's own process proves: by
// lease, why.
func Unproven(r *pb.Receipt) map[string]string {
	why := make(map[string]string)
	for _, e := range r.Entries {
		switch {
		case e.Report == nil:
			why[e.LeaseId] = "no report; the lease has run out"
		case len(e.PublicKey) == 0:
			why[e.LeaseId] = "a report, but the lease named no key to verify it by"
		}
	}
	return why
}

// Verify checks that a receipt hangs together: each report verifies, under the key that its lease
// was asked for with, and is of the receipt's key and its entry's node and lease.
func Verify(r *pb.Receipt) error {
	if r.Id == "" || r.Key == "" || r.RevokedUnixUs <= 0 {
		return errors.New("receipt: its id, key or time is missing")
	}
	seen := make(map[string]bool)
	for _, e := range r.Entries {
		if err := verifyEntry(r, e); err != nil {
			return fmt.Errorf("receipt %s: lease %s of node %q: %w", r.Id, e.LeaseId, e.Node, err)
		}
		if seen[e.LeaseId] {
			return fmt.Errorf("receipt %s: lease %s is there twice", r.Id, e.LeaseId)
		}
		seen[e.LeaseId] = true
	}
	return nil
}

func verifyEntry(r *pb.Receipt, e *pb.ReceiptEntry) error {
	if n := len(e.PublicKey); n != 0 && n != ed25519.PublicKeySize {
		return fmt.Errorf("its public key has %d bytes", n)
	}
	switch p := e.Report; {
	case p == nil && e.LeaseEndUnixUs <= 0:
		return errors.New("it has neither a report nor the end of the lease")
	case p == nil:
		return nil
	case p.Key != r.Key || p.LeaseId != e.LeaseId || p.Node != e.Node:
		return errors.New("its report is of another key, lease or node")
	case len(e.PublicKey) > 0:
		return shredreport.VerifyBy(p, e.PublicKey)
	default:
		return shredreport.Verify(p)
	}
}

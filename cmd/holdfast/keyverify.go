package main

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

// verifyReceipt checks the reports of a receipt, and counts them: each is signed with the key whose public half came
// with the lease, and is of that lease and of the receipt's key.
func verifyReceipt(r *pb.Receipt) (reports int, err error) {
	var errs []error
	for _, e := range r.Entries {
		if e.Report == nil {
			continue
		}
		reports++
		if err := verifyReport(r.Key, e); err != nil {
			errs = append(errs, fmt.Errorf("receipt %s, report of %s: %w", r.Id, e.Node, err))
		}
	}
	return reports, errors.Join(errs...)
}

func verifyReport(key string, e *pb.ReceiptEntry) error {
	rep := e.Report
	if rep.Key != key || rep.LeaseId != e.LeaseId || rep.Node != e.Node {
		return fmt.Errorf("it is of lease %s of %s on key %s, not of lease %s of %s on key %s", rep.LeaseId, rep.Node, rep.Key, e.LeaseId, e.Node, key)
	}
	return shredreport.VerifyBy(rep, e.PublicKey)
}

package main

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
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
	if len(e.PublicKey) != ed25519.PublicKeySize || !bytes.Equal(rep.PublicKey, e.PublicKey) {
		return errors.New("it is not signed with the key that the lease was asked for with")
	}
	unsigned, ok := proto.Clone(rep).(*pb.ShredReport)
	if !ok {
		panic("a clone has the type of what was cloned") // proto.Clone's contract
	}
	unsigned.Signature = nil
	message, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte("holdfast shred report v1\n"), unsigned)
	if err != nil {
		return err
	}
	if !ed25519.Verify(e.PublicKey, message, rep.Signature) {
		return errors.New("its signature is wrong: it was changed, or another made it")
	}
	return nil
}

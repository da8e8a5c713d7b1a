package keymgr

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/shredreport"
	"github.com/holdfastdb/holdfast/keymgr/lease"
	"github.com/holdfastdb/holdfast/keymgr/receipt"
)

// The causes of a revocation, in receipts and in the audit log.
const (
	causeDenied      = "denied"
	causeHeld        = "held"
	causeUnreachable = "unreachable"
)

const (
	// receiptEvery is how often what is open is looked at, and kept.
	receiptEvery = 100 * time.Millisecond
	// receiptRetry is the pause after one could not be kept.
	receiptRetry = time.Second
	// maxReceipts bounds the receipts of a key that are listed, the newest.
	maxReceipts = 200
	// lateReceipts bounds the receipts, the newest, in which a report is looked for that comes when its
	// receipt is closed: of a process that was stopped, and goes on.
	lateReceipts = 20
)

// openReceipt is a receipt that is not complete, or not in the bucket yet as it is.
type openReceipt struct {
	id      keyID
	receipt *pb.Receipt
	began   bool      // something of it has come true: it is to be kept
	opened  bool      // the audit log has it
	dirty   bool      // the bucket has it otherwise
	retry   time.Time // before it, after a failure, it is not tried again
}

// receiptBook holds the receipts that are filled now. It is kept in the bucket, behind what happens:
// no revocation waits for it.
type receiptBook struct {
	s       *Server
	keeping sync.Mutex // held while receipts are written: each by one at a time
	mu      struct {
		sync.Mutex
		open []*openReceipt
	}
}

func newReceiptBook(s *Server) *receiptBook { return &receiptBook{s: s} }

// receiptID sorts by time.
func receiptID(at time.Time) string {
	random := make([]byte, 4)
	rand.Read(random) // never fails: crypto/rand
	return at.UTC().Format("20060102t150405.000000") + "-" + hex.EncodeToString(random)
}

func (id keyID) receipts() string { return id.folder() + "receipts/" }

func (id keyID) receiptObject(receipt string) string { return id.receipts() + receipt + ".json" }

// open begins a receipt for leases that have ended, or (began false) will run out unless the KMS
// answers again.
func (b *receiptBook) open(k *keyState, cause string, leases []lease.Lease, began bool) {
	now := time.Now()
	r := &pb.Receipt{Id: receiptID(now), Key: k.id.String(), Cause: cause, RevokedUnixUs: now.UnixMicro()}
	k.mu.Lock()
	if doc := k.mu.doc; doc != nil {
		r.Cmk = doc.CMK
		if doc.Hold != nil && cause == causeHeld {
			r.Detail = doc.Hold.Reason
		}
	}
	if cause != causeHeld {
		r.Detail, r.RequestId = k.mu.lastError, k.mu.lastRequestID
	}
	k.mu.Unlock()
	if sinceStart := now.Sub(b.s.began); sinceStart < b.s.cfg.LeaseTTL {
		r.Detail += fmt.Sprintf(" (this key manager started %v before: leases that were given before that are not listed; the last of them runs out within %v of the start)",
			sinceStart.Round(time.Millisecond), b.s.cfg.LeaseTTL)
	}
	for _, l := range leases {
		r.Entries = append(r.Entries, &pb.ReceiptEntry{Node: l.Node, LeaseId: l.ID, Branch: l.Branch, PublicKey: []byte(l.PublicKey), LeaseEndUnixUs: wall(l.End).UnixMicro()})
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.open = append(b.mu.open, &openReceipt{id: k.id, receipt: r, began: began, dirty: true})
}

// recovered takes out of the key's receipts for want of an answer what goes on living after all.
func (b *receiptBook) recovered(id keyID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	kept := b.mu.open[:0]
	for _, o := range b.mu.open {
		if o.id == id && o.receipt.Cause == causeUnreachable {
			if o.drop(b.s.alive); !o.began {
				continue
			}
		}
		kept = append(kept, o)
	}
	clear(b.mu.open[len(kept):])
	b.mu.open = kept
}

// drop takes the leases that live out of a receipt.
func (o *openReceipt) drop(alive func(lease string) bool) {
	var gone []*pb.ReceiptEntry
	for _, e := range o.receipt.Entries {
		if e.Report != nil || !alive(e.LeaseId) {
			gone = append(gone, e)
		}
	}
	o.dirty = o.dirty || len(gone) != len(o.receipt.Entries)
	o.receipt.Entries = gone
}

// report puts a report where it belongs, if that is open, and tells whether it was.
func (b *receiptBook) report(id keyID, report *pb.ShredReport) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var newest *openReceipt
	for _, o := range b.mu.open {
		if o.id != id {
			continue
		}
		newest = o
		if receipt.Entry(o.receipt, report.LeaseId) != nil {
			return true, o.add(report)
		}
	}
	if newest == nil || b.s.alive(report.LeaseId) {
		return false, nil
	}
	return true, newest.add(report)
}

func (o *openReceipt) add(report *pb.ShredReport) error {
	changed, err := receipt.Add(o.receipt, report)
	if err != nil {
		return fmt.Errorf("%w: %w", errBadReport, err)
	}
	if changed {
		o.began, o.dirty = true, true
	}
	return nil
}

// run keeps what is open until the server closes.
func (b *receiptBook) run() {
	defer b.s.wg.Done()
	every := time.NewTicker(receiptEvery)
	defer every.Stop()
	for {
		select {
		case <-b.s.ctx.Done():
			return
		case <-every.C:
		}
		b.keepAll(b.s.ctx)
	}
}

// pending gives what is to be kept now, as it is now.
func (b *receiptBook) pending(now time.Time) (todo []*openReceipt, forms []*pb.Receipt) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.mu.open {
		r := o.receipt
		for _, e := range r.Entries {
			o.began = o.began || e.Report == nil && now.UnixMicro() >= e.LeaseEndUnixUs
		}
		if o.began && !r.Complete && receipt.Complete(r, now.UnixMicro()) {
			r.Complete, o.dirty = true, true
		}
		if o.began && o.dirty && (!now.Before(o.retry) || b.s.ctx.Err() != nil) { // closing, there is no other time
			todo, forms = append(todo, o), append(forms, proto.CloneOf(r))
			o.dirty = false
		}
	}
	return todo, forms
}

func (b *receiptBook) keepAll(ctx context.Context) {
	b.keeping.Lock()
	defer b.keeping.Unlock()
	todo, forms := b.pending(time.Now())
	each(len(todo), func(i int) {
		if err := b.keep(ctx, todo[i], forms[i]); err != nil && b.s.ctx.Err() == nil {
			b.s.cfg.Logger.Error("a receipt could not be kept; it will be tried again", "receipt", forms[i].Id, "key", forms[i].Key, "err", err)
		}
	})
}

// keep audits a receipt and puts it in the bucket; complete, it is closed. What fails is
// tried again.
func (b *receiptBook) keep(ctx context.Context, o *openReceipt, form *pb.Receipt) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := b.tryKeep(ctx, o, form)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		o.dirty, o.retry = true, time.Now().Add(receiptRetry)
		return err
	}
	if form.Complete && !o.dirty {
		for i := range b.mu.open {
			if b.mu.open[i] == o {
				b.mu.open = append(b.mu.open[:i:i], b.mu.open[i+1:]...)
				break
			}
		}
	}
	return nil
}

func (b *receiptBook) tryKeep(ctx context.Context, o *openReceipt, form *pb.Receipt) error {
	if !o.opened { // under keeping
		seq, err := b.s.audit.appendSeq(ctx, o.id.event(Event{Event: "receipt.opened", Outcome: form.Cause, RequestID: form.RequestId,
			Detail: fmt.Sprintf("receipt %s, %d leases", form.Id, len(form.Entries))}))
		if err != nil {
			return err
		}
		o.opened = true
		b.mu.Lock()
		o.receipt.AuditSeq = seq
		b.mu.Unlock()
		form.AuditSeq = seq
	}
	data, err := putReceipt(ctx, b.s.cfg.BlobStore, o.id, form)
	if err != nil || !form.Complete {
		return err
	}
	return b.s.audit.append(ctx, o.id.event(completed(form, data)))
}

// completed tells of a complete receipt as the bucket has it: also when a late report has changed it.
func completed(r *pb.Receipt, data []byte) Event {
	return Event{Event: eventCompleted, Outcome: "ok", Detail: fmt.Sprintf("receipt %s, %d leases, %d without a signed report, SHA-256 %x",
		r.Id, len(r.Entries), len(receipt.Unproven(r)), sha256.Sum256(data))}
}

const eventCompleted = "receipt.completed"

// CompletedReceipt reads what an event of the audit log says of a receipt: its id, and the SHA-256, in hexadecimal, of
// receipt.Marshal's form of it. A later event, of a late report, replaces an earlier one. ok is false for other events.
func CompletedReceipt(e Event) (id, sum string, ok bool) {
	if e.Event != eventCompleted {
		return "", "", false
	}
	rest, found := strings.CutPrefix(e.Detail, "receipt ")
	id, _, more := strings.Cut(rest, ",")
	_, sum, hasSum := strings.Cut(rest, "SHA-256 ")
	return id, sum, found && more && hasSum
}

// putReceipt makes the bucket have a receipt with all that it and the bucket's form of it have.
func putReceipt(ctx context.Context, store blob.Store, id keyID, r *pb.Receipt) ([]byte, error) {
	object := id.receiptObject(r.Id)
	var lastErr error
	for range maxUpdates {
		have, etag, err := store.Get(ctx, object)
		absent := errors.Is(err, blob.ErrNotFound)
		if err == nil {
			var old *pb.Receipt
			if old, err = receipt.Parse(have); err == nil {
				receipt.Merge(r, old)
			}
		}
		if err != nil && !absent {
			return nil, fmt.Errorf("receipt %s: %w", object, err)
		}
		data, err := receipt.Marshal(r)
		if err != nil {
			return nil, err
		}
		if absent {
			_, lastErr = store.Create(ctx, object, bytes.NewReader(data), int64(len(data)))
		} else {
			_, lastErr = store.Swap(ctx, object, data, etag)
		}
		if lastErr == nil { // the commit point
			return data, nil
		}
		// Lost a race, or the outcome is not known: the next turn looks at what is there.
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("keeping receipt %s: %w", object, lastErr)
}

// ReportShred implements pb.KeyManagerServer.
func (s *Server) ReportShred(ctx context.Context, req *pb.ShredReport) (*pb.ReportShredResponse, error) {
	id := parseKeyID(req.Key)
	if err := errors.Join(id.check(), shredreport.Verify(req)); err != nil {
		return nil, invalid("%v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, _, err := s.known(ctx, id); err != nil {
		return nil, s.callError(err)
	}
	found, err := s.receipts.report(id, req)
	if err == nil && !found {
		found, err = s.lateReport(ctx, id, req)
	}
	if err != nil {
		return nil, s.reportError(err)
	}
	detail := fmt.Sprintf("%s: %d keys wiped, all shredded at %s", req.Reason, req.Keys, time.UnixMicro(req.ShreddedUnixUs).UTC().Format(time.RFC3339Nano))
	if !found {
		detail += "; no revocation goes with it"
	}
	if err := s.audit.append(ctx, id.event(Event{Event: "shred.reported", Outcome: "ok", Node: req.Node, Lease: req.LeaseId, Detail: detail})); err != nil {
		return nil, s.callError(err)
	}
	return &pb.ReportShredResponse{}, nil
}

// errBadReport is of a report that does not fit its receipt.
var errBadReport = errors.New("the report does not fit")

func (s *Server) reportError(err error) error {
	if errors.Is(err, errBadReport) {
		return invalid("%v", err)
	}
	return s.callError(err)
}

// lateReport puts a report into a receipt that is closed already.
func (s *Server) lateReport(ctx context.Context, id keyID, report *pb.ShredReport) (bool, error) {
	receipts, err := s.loadReceipts(ctx, id, lateReceipts)
	if err != nil {
		return false, err
	}
	for _, r := range receipts {
		if receipt.Entry(r, report.LeaseId) == nil {
			continue
		}
		if _, err := receipt.Add(r, report); err != nil {
			return true, fmt.Errorf("%w: %w", errBadReport, err)
		}
		data, err := putReceipt(ctx, s.cfg.BlobStore, id, r)
		if err == nil && r.Complete {
			err = s.audit.append(ctx, id.event(completed(r, data)))
		}
		return true, err
	}
	return false, nil
}

// ListReceipts implements pb.KeyAdminServer. The newest comes first.
func (s *Server) ListReceipts(ctx context.Context, req *pb.KeyRef) (*pb.ListReceiptsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, err := s.named(ctx, req)
	if err != nil {
		return nil, err
	}
	s.receipts.keepAll(ctx)
	receipts, err := s.loadReceipts(ctx, k.id, maxReceipts)
	if err != nil {
		return nil, s.callError(err)
	}
	return &pb.ListReceiptsResponse{Receipts: receipts}, nil
}

// loadReceipts gives the newest receipts of a key, the newest first. One whose key manager
// ended before its leases did is complete when they have run out.
func (s *Server) loadReceipts(ctx context.Context, id keyID, most int) ([]*pb.Receipt, error) {
	var objects []string
	err := s.cfg.BlobStore.List(ctx, id.receipts(), func(i blob.Info) error { objects = append(objects, i.Key); return nil })
	if err != nil {
		return nil, fmt.Errorf("receipts of %s: %w", id.words(), err)
	}
	objects = objects[max(0, len(objects)-most):]
	receipts := make([]*pb.Receipt, 0, len(objects))
	for i := len(objects) - 1; i >= 0; i-- {
		data, _, err := s.cfg.BlobStore.Get(ctx, objects[i])
		if err != nil {
			return nil, fmt.Errorf("receipt %s: %w", objects[i], err)
		}
		r, err := receipt.Parse(data)
		if err != nil {
			return nil, fmt.Errorf("object %s: %w", objects[i], err)
		}
		r.Complete = r.Complete || receipt.Complete(r, time.Now().UnixMicro())
		receipts = append(receipts, r)
	}
	return receipts, nil
}

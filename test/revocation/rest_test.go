package revocation

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/test/cluster"
)

// sealedLayer is a layer as it rests in the bucket.
type sealedLayer struct {
	context seal.Context
	data    []byte
	wrapped []byte
}

// open tries a key on the layer, as whoever has the source can.
func (l *sealedLayer) open(ctx context.Context, data []byte, c seal.Context, raw []byte) ([]byte, error) {
	r, err := seal.NewReader(ctx, bytes.NewReader(data), int64(len(data)), c, func(context.Context, seal.Context, []byte) (*seal.Key, error) {
		return seal.NewOpenKey(bytes.Clone(raw))
	})
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
}

// disks is what an attacker has: everything that rests.
type disks struct {
	root   string
	bucket blob.Store
	layer  *sealedLayer
	wal    *pb.SealedWAL
	walOf  seal.Context
	kek    []byte // wrapped by the CMK
}

// keyDocument is the part of keys.json that an attacker reads.
type keyDocument struct {
	KEKs []struct {
		Version uint32
		CMK     string
		Wrapped []byte
	}
}

func (w *world) readDisks(ctx context.Context) *disks {
	w.t.Helper()
	bucket, err := dirblob.Open(filepath.Join(w.c.Data, "bucket"))
	if err != nil {
		w.t.Fatal(err)
	}
	d := &disks{root: w.c.Data, bucket: bucket}
	err = bucket.List(ctx, "projects/"+w.project+"/branches/"+w.branch+"/layers/", func(o blob.Info) error {
		if d.layer != nil {
			return nil
		}
		data, _, err := bucket.Get(ctx, o.Key)
		if err != nil || !bytes.HasPrefix(data, []byte("HFSEALED")) {
			return err
		}
		d.layer = &sealedLayer{context: seal.Context{Purpose: seal.PurposeLayer, Project: w.project, Branch: w.branch, Object: o.Key},
			data: data, wrapped: data[16 : 16+seal.WrappedSize]}
		return nil
	})
	if err != nil || d.layer == nil {
		w.t.Fatalf("no layer in the bucket: %v", err)
	}
	data, _, err := bucket.Get(ctx, "projects/"+w.project+"/keys.json")
	if err != nil {
		w.t.Fatal(err)
	}
	var doc keyDocument
	if err := json.Unmarshal(data, &doc); err != nil || len(doc.KEKs) == 0 {
		w.t.Fatalf("keys.json: %v", err)
	}
	d.kek = doc.KEKs[0].Wrapped
	w.readWAL(ctx, d)
	return d
}

// readWAL takes a stretch of sealed WAL from a safekeeper, which has it on its disk.
func (w *world) readWAL(ctx context.Context, d *disks) {
	w.t.Helper()
	conn, err := rpc.Dial(w.c.Socket(cluster.Safekeeper(1)))
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewSafekeeperClient(conn)
	st, err := client.Status(ctx, &pb.SafekeeperStatusRequest{})
	if err != nil || len(st.Branches) == 0 {
		w.t.Fatalf("a safekeeper's status: %v, %v", st, err)
	}
	b := st.Branches[0]
	stream, err := client.Read(ctx, &pb.ReadRequest{Project: b.Project, Branch: b.Branch, FromLsn: max(b.StartLsn, b.DurableLsn), UntilLsn: b.EndLsn})
	if err != nil {
		w.t.Fatal(err)
	}
	for d.wal == nil {
		resp, err := stream.Recv()
		if err != nil {
			w.t.Fatalf("reading sealed WAL: %v", err)
		}
		if len(resp.Chunks) > 0 {
			d.wal = resp.Chunks[0]
		}
	}
	d.walOf = seal.Context{Purpose: seal.PurposeWAL, Project: b.Project, Branch: b.Branch, Object: d.wal.Object}
}

func (d *disks) openWAL(raw []byte, c seal.Context, begin, end, counter uint64) error {
	k, err := seal.NewOpenKey(bytes.Clone(raw))
	if err != nil {
		return err
	}
	_, err = seal.OpenWAL(nil, k, c, pg.LSN(begin), pg.LSN(end), counter, d.wal.Ciphertext)
	return err
}

// TestWhatRests: in one cluster, sealed objects that are moved open nowhere; and with the CMK destroyed, whoever
// has the disks, the bucket and the source opens nothing with all the keys that were ever stored.
func TestWhatRests(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	w := newWorld(t, ctx, kinds[0].make(t), seed(t))
	w.l.Start()
	if err := errors.Join(w.l.WaitAcked(ctx, 100), w.plant(ctx)); err != nil {
		t.Fatal(err)
	}
	w.l.Pause()
	d := w.readDisks(ctx)
	provider, err := w.provider(ctx)
	if err != nil {
		t.Fatal(err)
	}
	unwrap := func(ec keymgr.EncryptionContext) ([]byte, error) {
		u, err := provider.Unwrap(ctx, w.cust.cmk, ec, d.kek)
		if err != nil {
			return nil, err
		}
		return u.Plaintext[len(u.Plaintext)-seal.KeySize:], nil
	}
	own := keymgr.EncryptionContext{Project: w.project, KEKVersion: 1}
	raw, err := unwrap(own)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("moved", func(t *testing.T) { d.moved(t, ctx, raw, unwrap, own) })
	if err := w.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	t.Run("attacker with the CMK", func(t *testing.T) {
		a := d.attack(ctx, raw)
		t.Logf("SHOW: with the CMK: %v", a)
		if !a.kek || !a.layer || !a.wal {
			t.Errorf("the attacker's kit does not work: with the CMK it got %v", a)
		}
	})
	if err := w.cust.destroy(); err != nil {
		t.Fatal(err)
	}
	t.Run("attacker without", func(t *testing.T) {
		if _, err := unwrap(own); err == nil {
			t.Fatal("the CMK is destroyed and unwraps")
		}
		a := d.attack(ctx)
		t.Logf("SHOW: without the CMK: %v", a)
		if a.tried < 10_000 {
			t.Errorf("only %d keys were tried", a.tried)
		}
		if a.kek || a.layer || a.wal {
			t.Errorf("what rests was opened without the CMK: %v", a)
		}
	})
}

// moved: each wrapped key and sealed object opens in its own place, and in no other.
func (d *disks) moved(t *testing.T, ctx context.Context, rawKEK []byte, unwrap func(keymgr.EncryptionContext) ([]byte, error), own keymgr.EncryptionContext) {
	kek, err := seal.NewKEK(bytes.Clone(rawKEK))
	if err != nil {
		t.Fatal(err)
	}
	layerKey, err := kek.Unwrap(d.layer.context, d.layer.wrapped)
	if err != nil {
		t.Fatalf("the layer's DEK in its own place: %v", err)
	}
	walKey, err := kek.Unwrap(d.walOf, d.wal.WrappedDek)
	if err != nil {
		t.Fatalf("the WAL's DEK in its own place: %v", err)
	}
	if _, err := d.layer.open(ctx, d.layer.data, d.layer.context, layerKey); err != nil {
		t.Fatalf("the layer in its own place: %v", err)
	}
	if err := d.openWAL(walKey, d.walOf, d.wal.BeginLsn, d.wal.EndLsn, d.wal.Counter); err != nil {
		t.Fatalf("the WAL in its own place: %v", err)
	}
	refused := 0
	must := func(what string, err error) {
		t.Helper()
		refused++
		if err == nil {
			t.Errorf("%s: it opened", what)
		}
	}
	for what, ec := range map[string]keymgr.EncryptionContext{
		"another project's": {Project: "other", KEKVersion: own.KEKVersion}, "another version": {Project: own.Project, KEKVersion: 2},
		"a branch's": {Project: own.Project, Branch: "b", KEKVersion: own.KEKVersion},
	} {
		_, err := unwrap(ec)
		must("the KEK as "+what, err)
	}
	for what, move := range moves() {
		_, err := kek.Unwrap(move(d.layer.context), d.layer.wrapped)
		must("the layer's DEK to "+what, err)
		_, err = kek.Unwrap(move(d.walOf), d.wal.WrappedDek)
		must("the WAL's DEK to "+what, err)
		_, err = d.layer.open(ctx, d.layer.data, move(d.layer.context), layerKey)
		must("the layer to "+what, err)
		must("the WAL to "+what, d.openWAL(walKey, move(d.walOf), d.wal.BeginLsn, d.wal.EndLsn, d.wal.Counter))
	}
	must("WAL to another beginning", d.openWAL(walKey, d.walOf, d.wal.BeginLsn+8, d.wal.EndLsn, d.wal.Counter))
	must("WAL to another end", d.openWAL(walKey, d.walOf, d.wal.BeginLsn, d.wal.EndLsn+8, d.wal.Counter))
	must("WAL to another counter", d.openWAL(walKey, d.walOf, d.wal.BeginLsn, d.wal.EndLsn, d.wal.Counter+1))
	for what, data := range d.layer.damaged() {
		_, err := d.layer.open(ctx, data, d.layer.context, layerKey)
		must("the layer with "+what, err)
	}
	t.Logf("SHOW: %d moves of wrapped keys, layers, chunks and WAL, each refused", refused)
}

// moves are changes of one part of a context.
func moves() map[string]func(seal.Context) seal.Context {
	return map[string]func(seal.Context) seal.Context{
		"another purpose": func(c seal.Context) seal.Context { c.Purpose = seal.PurposeSecret; return c },
		"another project": func(c seal.Context) seal.Context { c.Project = "other"; return c },
		"another branch":  func(c seal.Context) seal.Context { c.Branch = "other"; return c },
		"another object":  func(c seal.Context) seal.Context { c.Object += "x"; return c },
	}
}

// damaged are the layer's chunks in other places.
func (l *sealedLayer) damaged() map[string][]byte {
	const chunk = seal.ChunkSize + seal.TagSize
	start := 16 + seal.WrappedSize
	change := func(fn func([]byte) []byte) []byte { return fn(bytes.Clone(l.data)) }
	cases := map[string][]byte{
		"a changed byte":  change(func(b []byte) []byte { b[start+5] ^= 1; return b }),
		"its end cut off": change(func(b []byte) []byte { return b[:len(b)-1] }),
	}
	if len(l.data) >= start+2*chunk {
		cases["two chunks in each other's place"] = change(func(b []byte) []byte {
			first := bytes.Clone(b[start : start+chunk])
			copy(b[start:], b[start+chunk:start+2*chunk])
			copy(b[start+chunk:], first)
			return b
		})
		cases["its last chunk cut off"] = change(func(b []byte) []byte { return b[:start+chunk] })
	}
	return cases
}

// attack is what came of one.
type attack struct {
	files, tried    int
	kek, layer, wal bool
}

func (a attack) String() string {
	return fmt.Sprintf("%d files, %d keys tried: a wrapped DEK opened: %v, a layer: %v, WAL: %v", a.files, a.tried, a.kek, a.layer, a.wal)
}

// attack tries as a key: what it is given, and every 32 bytes of every file, at each place in small files
// and at many in others, as they are and where text says them in base64; as KEK, and as
// the DEK of a layer and of WAL. What it so finds is tried as well.
func (d *disks) attack(ctx context.Context, given ...[]byte) (a attack) {
	seen := make(map[[seal.KeySize]byte]bool)
	var try func(raw []byte)
	try = func(raw []byte) {
		key := [seal.KeySize]byte(raw)
		if seen[key] || ctx.Err() != nil {
			return
		}
		seen[key] = true
		a.tried++
		if kek, err := seal.NewKEK(bytes.Clone(raw)); err == nil {
			for c, wrapped := range map[seal.Context][]byte{d.layer.context: d.layer.wrapped, d.walOf: d.wal.WrappedDek} {
				if dek, err := kek.Unwrap(c, wrapped); err == nil {
					a.kek = true
					try(dek)
				}
			}
		}
		if _, err := d.layer.open(ctx, d.layer.data, d.layer.context, raw); err == nil {
			a.layer = true
		}
		if d.openWAL(raw, d.walOf, d.wal.BeginLsn, d.wal.EndLsn, d.wal.Counter) == nil {
			a.wal = true
		}
	}
	for _, raw := range given {
		try(raw)
	}
	_ = filepath.WalkDir(d.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		a.files++
		for _, raw := range candidates(path, data) {
			try(raw)
		}
		return nil
	})
	return a
}

// Files up to small are tried at each place; of larger ones, which are ciphertext nearly whole, the
// beginning and the end, where keys would stand, and a sample.
const (
	small  = 16 << 10
	edge   = 4 << 10
	sample = 4 << 10 // bytes from one place to the next
)

var encoded = regexp.MustCompile(`[A-Za-z0-9+/_-]{43,}=*`)

func candidates(path string, data []byte) (keys [][]byte) {
	windows := func(b []byte, step int) {
		for i := 0; i+seal.KeySize <= len(b); i += step {
			keys = append(keys, b[i:i+seal.KeySize])
		}
	}
	if len(data) <= small {
		windows(data, 1)
	} else {
		windows(data[:edge], 1)
		windows(data[len(data)-edge:], 1)
		windows(data, sample)
	}
	if strings.HasSuffix(path, ".jsonl") || len(data) <= small {
		for _, text := range encoded.FindAll(data, -1) {
			decoded, err := base64.StdEncoding.DecodeString(string(text))
			if err == nil {
				windows(decoded, 1)
			}
		}
	}
	return keys
}

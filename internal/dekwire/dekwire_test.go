package dekwire

import (
	"bytes"
	"context"
	"crypto/rand"
	"net"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// manager gives out DEKs, and remembers the slices in which it did.
type manager struct {
	pb.UnimplementedKeyManagerServer
	given  [][]byte // the slices
	copies [][]byte // what was in them
}

func (m *manager) make() []byte {
	raw := make([]byte, 32)
	rand.Read(raw)
	m.given, m.copies = append(m.given, raw), append(m.copies, bytes.Clone(raw))
	return raw
}

func (m *manager) GenerateDEKs(_ context.Context, r *pb.GenerateDEKsRequest) (*pb.GenerateDEKsResponse, error) {
	resp := &pb.GenerateDEKsResponse{}
	for range r.Contexts {
		resp.Deks = append(resp.Deks, &pb.DEK{Plaintext: m.make(), Wrapped: []byte("wrapped")})
	}
	return resp, nil
}

func (m *manager) UnwrapDEKs(_ context.Context, r *pb.UnwrapDEKsRequest) (*pb.UnwrapDEKsResponse, error) {
	resp := &pb.UnwrapDEKsResponse{}
	for range r.Deks {
		resp.Plaintexts = append(resp.Plaintexts, m.make())
	}
	return resp, nil
}

// tap keeps all bytes of a connection.
type tap struct {
	net.Conn
	mu  *sync.Mutex
	all *bytes.Buffer
}

func (t tap) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all.Write(p[:n])
	return n, err
}

// serve gives a client of a manager, over gRPC, and what went over the wire.
func serve(t *testing.T, m *manager) (pb.KeyManagerClient, func() []byte) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	pb.RegisterKeyManagerServer(g, Server(m))
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	var mu sync.Mutex
	var all bytes.Buffer
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := l.DialContext(ctx)
			return tap{c, &mu, &all}, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return pb.NewKeyManagerClient(conn), func() []byte {
		mu.Lock()
		defer mu.Unlock()
		return bytes.Clone(all.Bytes())
	}
}

var contexts = []*pb.DEKContext{{Purpose: "wal", Project: "p", Branch: "b", Object: "1"}, {Purpose: "layer", Project: "p", Branch: "b", Object: "2"}}

func TestDEKsArriveAndTheWireHasNone(t *testing.T) {
	m := &manager{}
	bare, wire := serve(t, m)
	c := Client(bare)
	made, err := c.GenerateDEKs(t.Context(), &pb.GenerateDEKsRequest{LeaseId: "l", Contexts: contexts})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := c.UnwrapDEKs(t.Context(), &pb.UnwrapDEKsRequest{LeaseId: "l", Deks: []*pb.WrappedDEK{{Context: contexts[0], Wrapped: []byte("w")}}})
	if err != nil {
		t.Fatal(err)
	}
	got := [][]byte{made.Deks[0].Plaintext, made.Deks[1].Plaintext, opened.Plaintexts[0]}
	if !slices.EqualFunc(got, m.copies, bytes.Equal) {
		t.Errorf("DEKs changed on their way: %x, want %x", got, m.copies)
	}
	for i, raw := range m.copies {
		if bytes.Contains(wire(), raw) {
			t.Errorf("DEK %d was on the wire in the clear", i)
		}
		if !bytes.Equal(m.given[i], make([]byte, 32)) {
			t.Errorf("the key manager's copy of DEK %d was not cleared", i)
		}
	}
	if len(wire()) < 100 {
		t.Errorf("only %d bytes were seen on the wire", len(wire()))
	}
}

func TestACallWithoutAKeyIsRefused(t *testing.T) {
	m := &manager{}
	bare, _ := serve(t, m)
	_, err := bare.GenerateDEKs(t.Context(), &pb.GenerateDEKsRequest{LeaseId: "l", Contexts: contexts})
	_, err2 := bare.UnwrapDEKs(t.Context(), &pb.UnwrapDEKsRequest{LeaseId: "l", ExchangeKey: bytes.Repeat([]byte{4}, 65)})
	for _, err := range []error{err, err2} {
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v, want InvalidArgument", err)
		}
	}
	if len(m.given) > 0 {
		t.Error("a DEK was made for a call that was refused")
	}
}

// An answer opens for its own call only: another lease, another object, another place in the answer, a
// replayed answer, and one that was not sealed at all do not.
func TestAnAnswerBelongsToItsCall(t *testing.T) {
	node, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	mine := node.PublicKey().Bytes()
	asked := askGenerate(&pb.GenerateDEKsRequest{LeaseId: "l", Contexts: contexts})
	seal, key, err := answerBox(mine, asked)
	if err != nil {
		t.Fatal(err)
	}
	raw := bytes.Repeat([]byte{7}, 32)
	sealed := seal.seal(0, raw)
	open := func(a ask, i int, clientKey []byte) ([]byte, error) {
		b, err := newBox(node, key, clientKey, key, a)
		if err != nil {
			t.Fatal(err)
		}
		return b.open(i, sealed)
	}
	if got, err := open(asked, 0, mine); err != nil || !bytes.Equal(got, raw) {
		t.Fatalf("%x, %v", got, err)
	}
	for name, a := range map[string]ask{
		"another lease":           askGenerate(&pb.GenerateDEKsRequest{LeaseId: "m", Contexts: contexts}),
		"another object":          askGenerate(&pb.GenerateDEKsRequest{LeaseId: "l", Contexts: contexts[:1]}),
		"another call":            askUnwrap(&pb.UnwrapDEKsRequest{LeaseId: "l", Deks: []*pb.WrappedDEK{{Context: contexts[0]}, {Context: contexts[1]}}}),
		"parts that run together": {call: "generate", lease: "l", parts: []string{"walp", "", "b", "1", "layer", "p", "b", "2"}},
	} {
		if _, err := open(a, 0, mine); err == nil {
			t.Errorf("%s: it opened", name)
		}
	}
	if _, err := open(asked, 1, mine); err == nil {
		t.Error("another place in the answer: it opened")
	}
	other, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := newBox(other, key, other.PublicKey().Bytes(), key, asked); err != nil {
		t.Fatal(err)
	} else if _, err := b.open(0, sealed); err == nil {
		t.Error("another node opened it")
	}
}

func TestAnAnswerInTheClearIsRefused(t *testing.T) {
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	pb.RegisterKeyManagerServer(g, &manager{}) // an old one
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := Client(pb.NewKeyManagerClient(conn)).GenerateDEKs(t.Context(), &pb.GenerateDEKsRequest{LeaseId: "l", Contexts: contexts}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v, want Unavailable", err)
	}
}

func BenchmarkCall(b *testing.B) {
	for b.Loop() {
		node, err := newKey()
		if err != nil {
			b.Fatal(err)
		}
		mine := node.PublicKey().Bytes()
		s, key, err := answerBox(mine, ask{})
		if err != nil {
			b.Fatal(err)
		}
		c, err := newBox(node, key, mine, key, ask{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.open(0, s.seal(0, make([]byte, 32))); err != nil {
			b.Fatal(err)
		}
	}
}

// Where one of an answer's DEKs does not open, the others do not stay open.
func TestOneThatDoesNotOpenClosesAll(t *testing.T) {
	own, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	public := own.PublicKey().Bytes()
	b, err := newBox(own, public, public, public, ask{})
	if err != nil {
		t.Fatal(err)
	}
	raw := bytes.Repeat([]byte{7}, 32)
	deks := [][]byte{b.seal(0, raw), b.seal(1, raw), b.seal(1, raw)}
	if err := b.openAll(deks); err == nil {
		t.Fatal("a DEK opened in another's place")
	}
	for _, d := range deks[:2] {
		if !bytes.Equal(d, make([]byte, 32)) {
			t.Errorf("what is left of one that opened: %d bytes", len(d))
		}
	}
}

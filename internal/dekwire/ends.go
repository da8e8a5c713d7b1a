package dekwire

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

func askGenerate(r *pb.GenerateDEKsRequest) ask {
	a := ask{call: "generate", lease: r.LeaseId}
	for _, c := range r.Contexts {
		a.add(c)
	}
	return a
}

func askUnwrap(r *pb.UnwrapDEKsRequest) ask {
	a := ask{call: "unwrap", lease: r.LeaseId}
	for _, d := range r.Deks {
		a.add(d.GetContext())
		a.parts = append(a.parts, string(d.GetWrapped()))
	}
	return a
}

func (a *ask) add(c *pb.DEKContext) {
	a.parts = append(a.parts, c.GetPurpose(), c.GetProject(), c.GetBranch(), c.GetObject())
}

// client is the node's end.
type client struct{ pb.KeyManagerClient }

// Client gives a key manager's client whose DEKs travel sealed. The DEKs that it returns are the
// caller's to clear. The requests that it is given are not changed.
func Client(c pb.KeyManagerClient) pb.KeyManagerClient { return client{c} }

// GenerateDEKs implements pb.KeyManagerClient.
func (c client) GenerateDEKs(ctx context.Context, req *pb.GenerateDEKsRequest, opts ...grpc.CallOption) (*pb.GenerateDEKsResponse, error) {
	own, err := newKey()
	if err != nil {
		return nil, err
	}
	mine := own.PublicKey().Bytes()
	sent := &pb.GenerateDEKsRequest{LeaseId: req.LeaseId, Contexts: req.Contexts, ExchangeKey: mine}
	resp, err := c.KeyManagerClient.GenerateDEKs(ctx, sent, opts...)
	if err != nil {
		return nil, err
	}
	b, err := newBox(own, resp.ExchangeKey, mine, resp.ExchangeKey, askGenerate(req))
	if err != nil {
		return nil, badAnswer(err)
	}
	defer b.wipe()
	raws := make([][]byte, len(resp.Deks))
	for i, d := range resp.Deks {
		raws[i] = d.Plaintext
	}
	if err := b.openAll(raws); err != nil {
		return nil, badAnswer(err)
	}
	for i, d := range resp.Deks {
		d.Plaintext = raws[i]
	}
	return resp, nil
}

// UnwrapDEKs implements pb.KeyManagerClient.
func (c client) UnwrapDEKs(ctx context.Context, req *pb.UnwrapDEKsRequest, opts ...grpc.CallOption) (*pb.UnwrapDEKsResponse, error) {
	own, err := newKey()
	if err != nil {
		return nil, err
	}
	mine := own.PublicKey().Bytes()
	sent := &pb.UnwrapDEKsRequest{LeaseId: req.LeaseId, Deks: req.Deks, ExchangeKey: mine}
	resp, err := c.KeyManagerClient.UnwrapDEKs(ctx, sent, opts...)
	if err != nil {
		return nil, err
	}
	b, err := newBox(own, resp.ExchangeKey, mine, resp.ExchangeKey, askUnwrap(req))
	if err != nil {
		return nil, badAnswer(err)
	}
	defer b.wipe()
	if err := b.openAll(resp.Plaintexts); err != nil {
		return nil, badAnswer(err)
	}
	return resp, nil
}

// badAnswer is Unavailable: what came is no answer of the key manager, and says nothing of the key.
func badAnswer(err error) error {
	return rpc.Error(codes.Unavailable, nil, "the key manager's answer: %v", err)
}

// server is the key manager's end.
type server struct{ pb.KeyManagerServer }

// Server gives a key manager that seals the DEKs that it gives out, and refuses a call that brings no
// key to seal them for. It clears what the one within returns.
func Server(s pb.KeyManagerServer) pb.KeyManagerServer { return server{s} }

// answerBox makes the server's half of a call's key.
func answerBox(clientKey []byte, a ask) (b *box, serverKey []byte, err error) {
	own, err := newKey()
	if err != nil {
		return nil, nil, rpc.Error(codes.Internal, nil, "%v", err)
	}
	serverKey = own.PublicKey().Bytes()
	b, err = newBox(own, clientKey, clientKey, serverKey, a)
	if err != nil {
		return nil, nil, rpc.Error(codes.InvalidArgument, nil, "DEKs travel sealed: want exchange_key, a P-256 public key: %v", err)
	}
	return b, serverKey, nil
}

// GenerateDEKs implements pb.KeyManagerServer.
func (s server) GenerateDEKs(ctx context.Context, req *pb.GenerateDEKsRequest) (*pb.GenerateDEKsResponse, error) {
	b, key, err := answerBox(req.ExchangeKey, askGenerate(req))
	if err != nil {
		return nil, err
	}
	defer b.wipe()
	resp, err := s.KeyManagerServer.GenerateDEKs(ctx, req)
	if err != nil {
		return nil, err
	}
	for i, d := range resp.Deks {
		raw := d.Plaintext
		d.Plaintext = b.seal(i, raw)
		clear(raw)
	}
	resp.ExchangeKey = key
	return resp, nil
}

// UnwrapDEKs implements pb.KeyManagerServer.
func (s server) UnwrapDEKs(ctx context.Context, req *pb.UnwrapDEKsRequest) (*pb.UnwrapDEKsResponse, error) {
	b, key, err := answerBox(req.ExchangeKey, askUnwrap(req))
	if err != nil {
		return nil, err
	}
	defer b.wipe()
	resp, err := s.KeyManagerServer.UnwrapDEKs(ctx, req)
	if err != nil {
		return nil, err
	}
	for i, raw := range resp.Plaintexts {
		resp.Plaintexts[i] = b.seal(i, raw)
		clear(raw)
	}
	resp.ExchangeKey = key
	return resp, nil
}

package kmsim

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"strconv"
	"strings"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// google speaks Google's Cloud KMS.
type google struct {
	kmspb.UnimplementedKeyManagementServiceServer
	sim *Sim
}

func (s *Sim) newGoogle() *grpc.Server {
	g := grpc.NewServer(grpc.UnaryInterceptor(s.recordGoogle))
	kmspb.RegisterKeyManagementServiceServer(g, &google{sim: s})
	return g
}

// recordGoogle notes a call. Google's answers have no request id: the reason that a caller gives
// is what its audit log can be searched for.
func (s *Sim) recordGoogle(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	first := func(name string) string {
		if v := md.Get(name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	e := Entry{Protocol: Google, Op: info.FullMethod[strings.LastIndex(info.FullMethod, "/")+1:], RequestID: newID(),
		CallersID: first("x-goog-request-reason"), Principal: bearer(first("authorization")), Outcome: "ok"}
	if named, ok := req.(interface{ GetName() string }); ok {
		e.Key = named.GetName()
	}
	fault, _ := s.faultNow()
	var resp any
	var err error
	switch {
	case fault == BadCredential || e.Principal == "":
		err = status.Error(codes.Unauthenticated, "Request had invalid authentication credentials.")
	case fault == Throttle:
		err = status.Error(codes.ResourceExhausted, "Quota exceeded.")
	case fault == Internal:
		err = status.Error(codes.Internal, "Internal error encountered.")
	default:
		resp, err = next(ctx, req)
	}
	if err != nil {
		e.Outcome = status.Code(err).String()
	}
	s.record(e)
	return resp, err
}

// bearer is who a service account's own token says that it is.
func bearer(authorization string) string {
	parts := strings.Split(strings.TrimPrefix(authorization, "Bearer "), ".")
	if len(parts) != 3 {
		return ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Issuer string `json:"iss"`
	}
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return ""
	}
	return claims.Issuer
}

func googleRefuse(why refusal) error {
	switch why {
	case absent:
		return status.Error(codes.NotFound, "CryptoKey not found.")
	case forbidden:
		st, err := status.New(codes.PermissionDenied, "Permission denied on resource (or it may not exist).").
			WithDetails(&errdetails.ErrorInfo{Reason: "IAM_PERMISSION_DENIED", Domain: "cloudkms.googleapis.com"})
		if err != nil {
			return err
		}
		return st.Err()
	}
	return status.Error(codes.FailedPrecondition, "The CryptoKeyVersion is not enabled.")
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, castagnoli)))
}

// Encrypt implements kmspb.KeyManagementServiceServer. A ciphertext is {version, 4 bytes} sealed.
func (g *google) Encrypt(_ context.Context, r *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	g.sim.mu.Lock()
	defer g.sim.mu.Unlock()
	k, why := g.sim.useLocked(r.Name)
	if why != usable {
		return nil, googleRefuse(why)
	}
	v := k.current()
	if v.destroyed {
		return nil, googleRefuse(destroyed)
	}
	b := append(binary.BigEndian.AppendUint32(nil, uint32(v.n)), v.seal(r.Plaintext, r.AdditionalAuthenticatedData)...)
	return &kmspb.EncryptResponse{Name: versionName(k, v), Ciphertext: b, CiphertextCrc32C: checksum(b),
		VerifiedPlaintextCrc32C:                   r.PlaintextCrc32C.GetValue() == checksum(r.Plaintext).Value,
		VerifiedAdditionalAuthenticatedDataCrc32C: r.AdditionalAuthenticatedDataCrc32C.GetValue() == checksum(r.AdditionalAuthenticatedData).Value}, nil
}

// Decrypt implements kmspb.KeyManagementServiceServer.
func (g *google) Decrypt(_ context.Context, r *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	g.sim.mu.Lock()
	defer g.sim.mu.Unlock()
	k, why := g.sim.useLocked(r.Name)
	if why != usable {
		return nil, googleRefuse(why)
	}
	refused := status.Error(codes.InvalidArgument, "Decryption failed: verify that 'name' refers to the correct CryptoKey.")
	if len(r.Ciphertext) < 4 {
		return nil, refused
	}
	v := k.find(int(binary.BigEndian.Uint32(r.Ciphertext)))
	if v == nil {
		return nil, refused
	}
	if v.destroyed {
		return nil, googleRefuse(destroyed)
	}
	plain, err := v.open(r.Ciphertext[4:], r.AdditionalAuthenticatedData)
	if err != nil {
		return nil, refused
	}
	return &kmspb.DecryptResponse{Plaintext: plain, PlaintextCrc32C: checksum(plain), UsedPrimary: v == k.current()}, nil
}

func versionName(k *key, v *version) string { return k.ref + "/cryptoKeyVersions/" + strconv.Itoa(v.n) }

func googleVersion(k *key, v *version) *kmspb.CryptoKeyVersion {
	state := map[State]kmspb.CryptoKeyVersion_CryptoKeyVersionState{Enabled: kmspb.CryptoKeyVersion_ENABLED, Disabled: kmspb.CryptoKeyVersion_DISABLED,
		PendingDeletion: kmspb.CryptoKeyVersion_DESTROY_SCHEDULED, Destroyed: kmspb.CryptoKeyVersion_DESTROYED}[k.state]
	if v.destroyed {
		state = kmspb.CryptoKeyVersion_DESTROYED
	}
	return &kmspb.CryptoKeyVersion{Name: versionName(k, v), State: state}
}

// GetCryptoKey implements kmspb.KeyManagementServiceServer.
func (g *google) GetCryptoKey(_ context.Context, r *kmspb.GetCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	g.sim.mu.Lock()
	defer g.sim.mu.Unlock()
	k, why := g.sim.look(r.Name)
	if why != usable {
		return nil, googleRefuse(why)
	}
	return &kmspb.CryptoKey{Name: k.ref, Purpose: kmspb.CryptoKey_ENCRYPT_DECRYPT, Primary: googleVersion(k, k.current())}, nil
}

// GetCryptoKeyVersion implements kmspb.KeyManagementServiceServer.
func (g *google) GetCryptoKeyVersion(_ context.Context, r *kmspb.GetCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	ref, number, _ := strings.Cut(r.Name, "/cryptoKeyVersions/")
	n, err := strconv.Atoi(number)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "malformed name")
	}
	g.sim.mu.Lock()
	defer g.sim.mu.Unlock()
	k, why := g.sim.look(ref)
	if why != usable {
		return nil, googleRefuse(why)
	}
	v := k.find(n)
	if v == nil {
		return nil, googleRefuse(absent)
	}
	return googleVersion(k, v), nil
}

// Package rpc is how Holdfast's roles reach one another: gRPC over a Unix socket in a
// folder that only this user may enter, or over loopback. Roles that share a process make the
// same calls through memory.
//
// Any other address is refused, in both directions: keys and plaintext pages travel on
// these connections, and there is no mutual TLS yet (invariants K1 and A1). So it is the folder
// that authorizes: who may enter it may ask every role for everything. On loopback that
// is every process of the machine: such addresses are for machines, or network namespaces, on
// which nothing else runs.
package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// MaxMessage bounds one message, in bytes, in both directions.
const MaxMessage = 64 << 20

// maxSocketPath is the longest path the kernel takes for a Unix socket (sun_path, less the NUL).
const maxSocketPath = 107

// Listen opens addr: "unix:/path" or a loopback "host:port". A stale socket file is
// replaced; one on which somebody answers is an error.
func Listen(addr string) (net.Listener, error) {
	path, isUnix := strings.CutPrefix(addr, "unix:")
	if !isUnix {
		if err := checkLoopback(addr); err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		return withInProcess(addr, l), nil
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket path %s has %d bytes, the most the kernel takes is %d: use a shorter data directory", path, len(path), maxSocketPath)
	}
	if err := makePrivate(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("folder of socket %s: %w", path, err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s is in use by another process", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the stale socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return withInProcess(addr, l), nil
}

// makePrivate makes a folder that only this user may enter, or sees that it is one. One that is
// there and is not is left as it is: it may be everybody's, as /tmp, or somebody else's, who could
// put sockets of their own in the place of ours.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t).Uid // what package os gives on Linux
	if !st.IsDir() || st.Mode().Perm()&0o077 != 0 || int(owner) != os.Geteuid() {
		return fmt.Errorf("%s (%v, of user %d) is no folder that only this user may enter: use a folder for sockets alone, of mode 700 and no symbolic link", dir, st.Mode(), owner)
	}
	return nil
}

func checkLoopback(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q: want unix:/path or host:port: %w", addr, err)
	}
	if ip := net.ParseIP(host); host == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("address %q is not on loopback: service calls carry keys and are not under TLS yet; use unix:/path or 127.0.0.1:port", addr)
}

// Dial makes a connection to addr; it connects at the first call and again after a loss.
func Dial(addr string) (*grpc.ClientConn, error) {
	if !strings.HasPrefix(addr, "unix:") {
		if err := checkLoopback(addr); err != nil {
			return nil, err
		}
	}
	cfg := grpc.ConnectParams{MinConnectTimeout: 2 * time.Second}
	cfg.Backoff.BaseDelay = 20 * time.Millisecond
	cfg.Backoff.Multiplier = 1.6
	cfg.Backoff.Jitter = 0.2
	cfg.Backoff.MaxDelay = 500 * time.Millisecond
	return grpc.NewClient("passthrough:///"+addr,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return connect(ctx, addr) }),
		grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(cfg),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithInitialWindowSize(4<<20), grpc.WithInitialConnWindowSize(8<<20),
	)
}

// NewServer makes a server with Holdfast's limits.
func NewServer(opts ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessage), grpc.MaxSendMsgSize(MaxMessage),
		grpc.InitialWindowSize(4 << 20), grpc.InitialConnWindowSize(8 << 20),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}, opts...)...)
}

// Error makes a status error that carries a detail for code to branch on.
func Error(code codes.Code, detail *pb.ErrorDetail, format string, args ...any) error {
	st := status.New(code, fmt.Sprintf(format, args...))
	if detail == nil {
		return st.Err()
	}
	with, err := st.WithDetails(detail)
	if err != nil { // only for codes.OK, or a detail that cannot be marshalled
		return st.Err()
	}
	return with.Err()
}

// Detail is the detail that err carries, or nil.
func Detail(err error) *pb.ErrorDetail {
	st, ok := status.FromError(err)
	if !ok {
		return nil
	}
	for _, d := range st.Details() {
		if detail, ok := d.(*pb.ErrorDetail); ok {
			return detail
		}
	}
	return nil
}

// Reason is the reason that err carries, or UNSPECIFIED.
func Reason(err error) pb.ErrorDetail_Reason { return Detail(err).GetReason() }

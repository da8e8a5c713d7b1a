package keyloss

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

func TestWords(t *testing.T) {
	const since = 1767225600000 // 2026-01-01
	for _, tc := range []struct {
		name string
		st   *pb.KeyStatusResponse
		want Notice
	}{
		{"disabled", &pb.KeyStatusResponse{State: pb.KeyRevoked, ControlledBy: "AWS KMS key arn:x", SinceUnixMs: since, ProviderError: "SECRET"}, Notice{
			Message: "the key of project p is disabled",
			Detail:  "This is so since 2026-01-01 00:00:00 UTC. Meanwhile nobody can read any of its data; what was committed is kept.",
			Hint:    "The key is controlled by its owner, in AWS KMS key arn:x. When it is enabled there, service resumes by itself.",
		}},
		{"held", &pb.KeyStatusResponse{State: pb.KeyRevoked, Key: "p/b", ControlledBy: "`holdfast key resume`"}, Notice{
			Message: "the key of branch b of project p is held back by its operator",
			Detail:  "This is so now. Meanwhile nobody can read any of its data; what was committed is kept.",
			Hint:    "`holdfast key resume` ends it; then service resumes by itself.",
		}},
		{"unreachable", &pb.KeyStatusResponse{State: pb.KeyUnreachable, Cmk: "dev"}, Notice{
			Message: "the key of project p cannot be checked",
			Detail:  "This is so now. Meanwhile nobody can read any of its data; what was committed is kept.",
			Hint:    "The key is controlled by its owner, in the KMS (key dev), which does not answer. When it does, service resumes by itself.",
		}},
		{"nothing is known", nil, Notice{
			Message: "the key of project p cannot be checked",
			Detail:  "This is so now. Meanwhile nobody can read any of its data; what was committed is kept.",
			Hint:    "The key is controlled by its owner, in the KMS, which does not answer. When it does, service resumes by itself.",
		}},
		{"resuming", &pb.KeyStatusResponse{State: pb.KeyResuming}, Notice{
			Message: "the endpoint is starting: the key of project p can be used again", Hint: "Try again in a few seconds."}},
	} {
		if diff := cmp.Diff(tc.want, Of("p", tc.st)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

func TestFatalIsAnErrorResponse(t *testing.T) {
	n := Notice{Message: "m", Detail: "d", Hint: "h"}
	data := n.Fatal(CannotConnectNow)
	if data[0] != 'E' {
		t.Fatalf("type %q", data[0])
	}
	var m pgproto3.ErrorResponse
	if err := m.Decode(data[5:]); err != nil {
		t.Fatal(err)
	}
	got := []string{m.Severity, m.SeverityUnlocalized, m.Code, m.Message, m.Detail, m.Hint}
	if diff := cmp.Diff([]string{"FATAL", "FATAL", CannotConnectNow, "m", "d", "h"}, got); diff != "" {
		t.Error(diff)
	}
}

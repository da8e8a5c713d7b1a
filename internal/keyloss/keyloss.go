// Package keyloss is what a client of PostgreSQL is told when the project's key cannot be used:
// one place for the words and the SQLSTATEs, for connections that end and for those that come.
//
// The words are for people who may know nothing of Holdfast: what is the matter, since when, who can
// end it, and that nothing is lost. They name the key, which is no secret, and hold nothing of
// what the KMS or a user said.
package keyloss

import (
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// SQLSTATEs. Drivers and pools know both: they take a connection that ended with AdminShutdown for
// one to be made anew, and where several servers are named they try the next on CannotConnectNow.
const (
	AdminShutdown    = "57P01" // of a connection that was there
	CannotConnectNow = "57P03" // of one that comes
)

// Notice is what a client is told, in the terms of PostgreSQL's error messages.
type Notice struct{ Message, Detail, Hint string }

// Of says why the project cannot be used, by what the key manager says of its key.
func Of(project string, st *pb.KeyStatusResponse) Notice {
	key := KeyName(project, st)
	switch {
	case st.GetState() == pb.KeyRevoked && held(st):
		return Notice{
			Message: fmt.Sprintf("the key of %s is held back by its operator", key),
			Detail:  detail(st),
			Hint:    "`holdfast key resume` ends it; then service resumes by itself.",
		}
	case st.GetState() == pb.KeyRevoked:
		return Notice{
			Message: fmt.Sprintf("the key of %s is disabled", key),
			Detail:  detail(st),
			Hint:    "The key is controlled by its owner, in " + Controller(st) + ". When it is enabled there, service resumes by itself.",
		}
	case pb.KeyUsable(st.GetState()):
		return Notice{
			Message: fmt.Sprintf("the endpoint is starting: the key of %s can be used again", key),
			Hint:    "Try again in a few seconds.",
		}
	}
	return Notice{
		Message: fmt.Sprintf("the key of %s cannot be checked", key),
		Detail:  detail(st),
		Hint:    "The key is controlled by its owner, in " + Controller(st) + ", which does not answer. When it does, service resumes by itself.",
	}
}

// held tells whether an operator of Holdfast, not the KMS, holds the key back.
func held(st *pb.KeyStatusResponse) bool { return strings.Contains(st.GetControlledBy(), "key resume") }

// KeyName says whose key it is.
func KeyName(project string, st *pb.KeyStatusResponse) string {
	if p, branch, ok := strings.Cut(st.GetKey(), "/"); ok {
		return "branch " + branch + " of project " + p
	}
	return "project " + project
}

// Controller says who can end a denial.
func Controller(st *pb.KeyStatusResponse) string {
	switch {
	case st.GetControlledBy() != "":
		return st.ControlledBy
	case st.GetCmk() != "":
		return "the KMS (key " + st.Cmk + ")"
	}
	return "the KMS"
}

func detail(st *pb.KeyStatusResponse) string {
	since := " now"
	if st.GetSinceUnixMs() > 0 {
		since = " since " + time.UnixMilli(st.SinceUnixMs).UTC().Format("2006-01-02 15:04:05 UTC")
	}
	return "This is so" + since + ". Meanwhile nobody can read any of its data; what was committed is kept."
}

// Fatal is the message as PostgreSQL would send it before it ends a connection.
func (n Notice) Fatal(sqlState string) []byte {
	m := &pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: sqlState, Message: n.Message, Detail: n.Detail, Hint: n.Hint}
	data, err := m.Encode(nil)
	if err != nil {
		panic("encoding an ErrorResponse: " + err.Error()) // only over 1 GiB
	}
	return data
}

// String is the notice in one line, for operators.
func (n Notice) String() string {
	s := n.Message
	if n.Hint != "" {
		s += ". " + strings.TrimSuffix(n.Hint, ".")
	}
	return s
}

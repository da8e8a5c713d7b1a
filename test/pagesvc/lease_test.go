package pagesvc

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// A lease that ran out, which nobody has noticed yet (the machine slept): what is in memory is no
// answer to anybody. Each call looks right before it answers.
func TestNoAnswerPastTheLeasesEnd(t *testing.T) {
	w := imported(t)
	at := w.point(w.log.end, true)
	calls := map[string]func() error{
		"GetPages": func() error { return w.pgClass(t.Context(), at) },
		"ListRelations": func() error {
			_, err := w.client.ListRelations(t.Context(), &pb.ListRelationsRequest{At: at, Tablespace: 1663, Database: 5})
			return err
		},
		"ListSLRU": func() error {
			_, err := w.client.ListSLRU(t.Context(), &pb.ListSLRURequest{At: at, Slru: 1})
			return err
		},
		"StartupState": func() error {
			_, err := w.client.StartupState(t.Context(), &pb.StartupStateRequest{At: at})
			return err
		},
	}
	for name, call := range calls { // all is in memory then
		if err := call(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	w.ring.Expire()
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			wantCode(t, call(), codes.Unavailable, pb.ErrorDetail_KEY_UNREACHABLE)
		})
	}
}

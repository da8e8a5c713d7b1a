// Package reconcile compares a key manager's audit log with the log that the KMS itself keeps,
// call by call, by the request ids that both have. What is only in the KMS's log was done with the key
// by somebody else, or was cut out of ours; what is only in ours was cut out of the KMS's.
package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/holdfastdb/holdfast/keymgr"
)

// Call is a call to the KMS as the KMS's log has it.
type Call struct {
	Time      time.Time
	IDs       []string // the service's own, and one that the caller gave
	Key       string   // as the service calls it; perhaps of one of its versions
	Op        string
	Principal string
	Failure   string // empty: it succeeded
}

func (c Call) String() string {
	outcome := c.Failure
	if outcome == "" {
		outcome = "ok"
	}
	return fmt.Sprintf("%s %s of %s by %s: %s (request id %s)", c.Time.UTC().Format(time.RFC3339), c.Op, c.Key, c.Principal, outcome, strings.Join(c.IDs, " "))
}

// Window is the time that is compared. A zero bound is open.
type Window struct{ Since, Until time.Time }

func (w Window) holds(t time.Time) bool {
	return (w.Since.IsZero() || !t.Before(w.Since)) && (w.Until.IsZero() || !t.After(w.Until))
}

// lostFor is how long after a call that we gave up the KMS may have carried it out, and skew how
// far the two clocks may be apart.
const (
	lostFor = 30 * time.Second
	skew    = 5 * time.Second
)

// Report is what Compare found. The first three are findings.
type Report struct {
	OnlyOurs   []string // events whose request id the KMS's log does not have
	OnlyTheirs []string // successful calls that our log does not have
	Differ     []string // calls whose outcome the logs do not agree on

	Matched int // calls that both logs have
	// Lost are successful calls that the KMS has and our log may have as one that got no answer, and
	// so no id. Refused are calls that nothing was gained by, such as those before a login.
	Lost, Refused []string
	Unanswered    int // events without an id, since no answer came
	Outside       int // events and calls outside the window
	Window        Window
}

// Clean tells whether the logs agree.
func (r *Report) Clean() bool { return len(r.OnlyOurs)+len(r.OnlyTheirs)+len(r.Differ) == 0 }

// Compare compares events with calls of the keys that the events name. A zero window is that
// of the KMS's log, from its first call to its last.
func Compare(events []keymgr.Event, calls []Call, w Window) *Report {
	slices.SortStableFunc(calls, func(a, b Call) int { return a.Time.Compare(b.Time) })
	if w == (Window{}) && len(calls) > 0 {
		w = Window{calls[0].Time.Add(-skew), calls[len(calls)-1].Time.Add(skew)}
	}
	c := comparison{report: &Report{Window: w}, byID: make(map[string][]int), matched: make([]bool, len(calls)), calls: calls}
	for i, call := range calls {
		for _, id := range call.IDs {
			c.byID[id] = append(c.byID[id], i)
			c.hasOurIDs = c.hasOurIDs || strings.HasPrefix(id, "holdfast-") // kmshttp.NewID's
		}
	}
	for _, e := range events {
		if asksKMS(e) {
			c.event(e)
		}
	}
	for i := range calls {
		c.call(i)
	}
	return c.report
}

// asksKMS tells the events that are calls to the KMS.
func asksKMS(e keymgr.Event) bool { return strings.HasPrefix(e.Event, "cmk.") }

type comparison struct {
	report     *Report
	calls      []Call
	byID       map[string][]int
	matched    []bool
	keys       []string // that our events name
	unanswered []keymgr.Event
	hasOurIDs  bool // the KMS's log keeps the ids that we give our calls
}

func describe(e keymgr.Event) string {
	return fmt.Sprintf("event %d, %s %s of %s: %s (request id %s)", e.Seq, e.Time.UTC().Format(time.RFC3339), e.Event, e.CMK, e.Outcome, cmp.Or(e.RequestID, "none"))
}

// event looks for one of our events in the KMS's log.
func (c *comparison) event(e keymgr.Event) {
	if !slices.Contains(c.keys, e.CMK) {
		c.keys = append(c.keys, e.CMK)
	}
	ids := strings.Fields(e.RequestID)
	inWindow := c.report.Window.holds(e.Time)
	if !inWindow {
		c.report.Outside++
	}
	if len(ids) == 0 {
		if e.Outcome == "ok" || e.Outcome == "denied" { // an answer has an id
			c.report.OnlyOurs = append(c.report.OnlyOurs, describe(e)+": an answer without a request id")
		}
		c.report.Unanswered++
		c.unanswered = append(c.unanswered, e)
		return
	}
	found, missing, failed := 0, 0, 0
	for _, id := range ids {
		if len(c.byID[id]) == 0 {
			missing++
		}
		for _, i := range c.byID[id] {
			c.matched[i] = true
			found++
			if c.calls[i].Failure != "" {
				failed++
			}
		}
	}
	c.report.Matched += found
	switch {
	case !inWindow:
	case found == 0 && e.Outcome == "unreachable": // the id may be ours, of a call that did not arrive
		c.report.Unanswered++
		if !c.hasOurIDs { // or it would have this one
			c.unanswered = append(c.unanswered, e)
		}
	case found == 0, e.Outcome == "ok" && missing > 0:
		c.report.OnlyOurs = append(c.report.OnlyOurs, describe(e))
	case e.Outcome == "ok" && failed > 0:
		c.report.Differ = append(c.report.Differ, describe(e)+"; the KMS's log has a failure of it")
	case e.Outcome == "denied" && failed == 0:
		c.report.Differ = append(c.report.Differ, describe(e)+"; the KMS's log has it as done")
	}
}

// call judges one that none of our events has.
func (c *comparison) call(i int) {
	call := c.calls[i]
	switch {
	case c.matched[i] || !c.isOurs(call.Key):
	case !c.report.Window.holds(call.Time):
		c.report.Outside++
	case call.Failure != "":
		c.report.Refused = append(c.report.Refused, call.String())
	case c.mayBeLost(call):
		c.report.Lost = append(c.report.Lost, call.String())
	default:
		c.report.OnlyTheirs = append(c.report.OnlyTheirs, call.String())
	}
}

// mayBeLost tells whether one of our calls without an answer may be this one.
func (c *comparison) mayBeLost(call Call) bool {
	return slices.ContainsFunc(c.unanswered, func(e keymgr.Event) bool {
		return sameKey(e.CMK, call.Key) && call.Time.After(e.Time.Add(-lostFor)) && call.Time.Before(e.Time.Add(lostFor))
	})
}

func (c *comparison) isOurs(key string) bool {
	return slices.ContainsFunc(c.keys, func(cmk string) bool { return sameKey(cmk, key) })
}

// kinds begin a CMK's name, before what the service itself calls the key.
var kinds = []string{"aws-kms:", "gcp-kms:", "azure-kv:", "vault:", "local:", "pkcs11:"}

// Concerns tells whether a log of this format can have calls with a CMK.
func Concerns(format, cmk string) bool {
	kind := map[string]string{"cloudtrail": "aws-kms:", "gcp": "gcp-kms:", "azure": "azure-kv:", "vault": "vault:"}[format]
	if kind != "" {
		return strings.HasPrefix(cmk, kind)
	}
	return slices.ContainsFunc(kinds[:4], func(k string) bool { return strings.HasPrefix(cmk, k) })
}

// sameKey tells whether the KMS's log means our CMK: the key, one of its versions, or a shorter form
// of its name, such as AWS's id without the rest of the ARN.
func sameKey(cmk, key string) bool {
	for _, k := range kinds {
		if name, ok := strings.CutPrefix(cmk, k); ok {
			cmk = name
			break
		}
	}
	return key != "" && (cmk == key || strings.HasPrefix(key, cmk+"/") || strings.HasSuffix(cmk, "/"+key))
}

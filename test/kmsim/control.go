package kmsim

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Control is the customer's console and the hand that breaks things, over HTTP. It asks for no
// password and belongs on an address that only the demonstration reaches.
//
//	GET  /keys, /log
//	POST /keys?protocol=aws&name=orders
//	POST /state?key=REF&state=disabled[&after=USES]
//	POST /rotate?key=REF    /revoke?key=REF&revoked=true    /destroy-version?key=REF&version=1
//	POST /fault?fault=throttle[&latency=2s]
func (s *Sim) Control() http.Handler {
	mux := http.NewServeMux()
	show := func(pattern string, get func() any) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, get()) })
	}
	do := func(pattern string, act func(url.Values) (string, error)) {
		mux.HandleFunc("POST "+pattern, func(w http.ResponseWriter, r *http.Request) {
			done, err := act(r.URL.Query())
			if err != nil {
				writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
				return
			}
			writeJSON(w, http.StatusOK, map[string]string{"done": done})
		})
	}
	show("/keys", func() any { return s.Keys() })
	show("/log", func() any { return s.Log() })
	do("/keys", func(q url.Values) (string, error) { return s.CreateKey(Protocol(q.Get("protocol")), q.Get("name")) })
	do("/state", s.controlState)
	do("/rotate", func(q url.Values) (string, error) { return "rotated", s.Rotate(q.Get("key")) })
	do("/revoke", func(q url.Values) (string, error) {
		revoked, err := strconv.ParseBool(q.Get("revoked"))
		if err != nil {
			return "", fmt.Errorf("revoked: %w", err)
		}
		return "revoked: " + strconv.FormatBool(revoked), s.Revoke(q.Get("key"), revoked)
	})
	do("/destroy-version", func(q url.Values) (string, error) {
		n, err := strconv.Atoi(q.Get("version"))
		if err != nil {
			return "", fmt.Errorf("version: %w", err)
		}
		return "destroyed", s.DestroyVersion(q.Get("key"), n)
	})
	do("/fault", s.controlFault)
	return mux
}

func (s *Sim) controlState(q url.Values) (string, error) {
	state := State(q.Get("state"))
	if q.Get("after") == "" {
		return string(state), s.SetState(q.Get("key"), state)
	}
	uses, err := strconv.Atoi(q.Get("after"))
	if err != nil || uses < 0 {
		return "", fmt.Errorf("after: want a number of uses, not %q", q.Get("after"))
	}
	return fmt.Sprintf("%s after %d uses", state, uses), s.SetStateAfter(q.Get("key"), state, uses)
}

func (s *Sim) controlFault(q url.Values) (string, error) {
	switch f := Fault(q.Get("fault")); f {
	case NoFault, Throttle, Internal, BlackHole, Impostor, BadCredential, BadIdentity:
		s.SetFault(f)
	case Latency:
		d, err := time.ParseDuration(q.Get("latency"))
		if err != nil {
			return "", fmt.Errorf("latency: %w", err)
		}
		s.SetLatency(d)
	default:
		return "", fmt.Errorf("fault %q is not known", f)
	}
	return "fault: " + q.Get("fault"), nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // a client that went away
}

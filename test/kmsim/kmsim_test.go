package kmsim

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

func listen(t *testing.T) (*Server, *http.Client) {
	t.Helper()
	s, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CAPEM)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return s, &http.Client{Transport: transport}
}

// post sends an operation of AWS's protocol.
func post(ctx context.Context, t *testing.T, c *http.Client, url, op, body string) (int, string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Amz-Target", "TrentService."+op)
	r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIA/20260101/eu-central-1/kms/aws4_request")
	resp, err := c.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func TestLatencyEndsWithTheCaller(t *testing.T) {
	s, c := listen(t)
	ref, err := s.CreateKey(AWS, "a")
	if err != nil {
		t.Fatal(err)
	}
	s.SetLatency(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if status, _, err := post(ctx, t, c, s.URL(), "DescribeKey", `{"KeyId":"`+ref+`"}`); err == nil {
		t.Errorf("a call that takes an hour was answered with %d", status)
	}
	s.SetFault(NoFault)
	if status, body, err := post(t.Context(), t, c, s.URL(), "DescribeKey", `{"KeyId":"`+ref+`"}`); err != nil || status != 200 || !strings.Contains(body, `"KeyState":"Enabled"`) {
		t.Errorf("without latency: %d %s %v", status, body, err)
	}
	if log := s.Log(); len(log) != 1 || log[0].Principal != "AKIA" || log[0].Outcome != "ok" || log[0].Key != ref || log[0].RequestID == "" {
		t.Errorf("log %+v", log)
	}
}

func TestCustomersConsole(t *testing.T) {
	s := New()
	if _, err := s.CreateKey("other", "a"); err == nil {
		t.Error("a key of no protocol")
	}
	ref, err := s.CreateKey(AWS, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetState(ref, Destroyed); err != nil {
		t.Fatal(err)
	}
	_, twice := s.CreateKey(AWS, "a")
	for what, err := range map[string]error{
		"a key twice": twice, "a destroyed key enabled": s.SetState(ref, Enabled), "no such state": s.SetState(ref, "odd"),
		"no such key": s.Rotate("absent"), "no such version": s.DestroyVersion(ref, 2),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if keys := s.Keys(); len(keys) != 1 || keys[0] != (KeyInfo{Ref: ref, Protocol: AWS, State: Destroyed, Versions: 1}) {
		t.Errorf("keys %+v", keys)
	}
}

func TestControl(t *testing.T) {
	s := New()
	h := s.Control()
	call := func(method, path string, want int) string {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		if w.Code != want {
			t.Errorf("%s %s: %d %s, want %d", method, path, w.Code, w.Body, want)
		}
		return w.Body.String()
	}
	call("POST", "/keys?protocol=aws&name=orders", 200)
	ref := s.Keys()[0].Ref
	key := "?key=" + url.QueryEscape(ref)
	call("POST", "/rotate"+key, 200)
	call("POST", "/revoke"+key+"&revoked=true", 200)
	call("POST", "/state"+key+"&state=disabled", 200)
	if k := s.Keys()[0]; k != (KeyInfo{Ref: ref, Protocol: AWS, State: Disabled, Versions: 2, Revoked: true}) {
		t.Errorf("key %+v", k)
	}
	if got := call("GET", "/keys", 200); !strings.Contains(got, ref) || !strings.Contains(got, `"disabled"`) {
		t.Errorf("GET /keys: %s", got)
	}
	call("POST", "/state"+key+"&state=enabled", 200)
	call("POST", "/state"+key+"&state=disabled&after=1", 200)
	call("POST", "/revoke"+key+"&revoked=false", 200)
	for _, want := range []refusal{usable, disabled} {
		if _, why := s.useLocked(ref); why != want { // nobody else uses s
			t.Errorf("refusal %d, want %d", why, want)
		}
	}
	call("POST", "/destroy-version"+key+"&version=1", 200)
	call("POST", "/fault?fault=latency&latency=2s", 200)
	if f, d := s.faultNow(); f != Latency || d != 2*time.Second {
		t.Errorf("fault %v %v", f, d)
	}
	call("POST", "/fault?fault=throttle", 200)
	call("GET", "/log", 200)
	for _, bad := range []string{"/keys?protocol=x", "/state?key=absent&state=disabled", "/state" + key + "&state=odd", "/state" + key + "&state=disabled&after=-1",
		"/revoke" + key, "/rotate?key=absent", "/destroy-version" + key + "&version=9", "/fault?fault=odd", "/fault?fault=latency"} {
		call("POST", bad, 400)
	}
}

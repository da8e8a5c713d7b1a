package kmshttp

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

func TestClientKeepsToTheService(t *testing.T) {
	var asked []string
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Proto+" "+r.URL.Path)
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := Client(caFile)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get(srv.URL + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusTemporaryRedirect || len(asked) != 1 || asked[0] != "HTTP/1.1 /" {
		t.Errorf("status %d, asked %q; want the redirect itself, over HTTP/1.1", resp.StatusCode, asked)
	}
	untrusting, err := Client("")
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := untrusting.Get(srv.URL + "/"); err == nil {
		resp.Body.Close()
		t.Error("a server that no known authority vouches for was heard")
	}
}

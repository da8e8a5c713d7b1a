package kmshttp

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestDroppedConnectionsAreMadeAnew(t *testing.T) {
	var from []string
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { from = append(from, r.RemoteAddr) }))
	defer s.Close()
	c, err := Client("")
	if err != nil {
		t.Fatal(err)
	}
	get := func() {
		t.Helper()
		resp, err := c.Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	get()
	get()
	DropConnections()
	get()
	if from[0] != from[1] || from[1] == from[2] {
		t.Errorf("calls came from %v: want the first two over one connection, the third over another", from)
	}
	own, err := Dial(t.Context(), s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	DropConnections()
	if _, err := own.Write([]byte("x")); err == nil {
		t.Error("a connection of Dial outlived DropConnections")
	}
}

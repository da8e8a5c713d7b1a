// Command kmsimd runs kmsim for demonstrations: the cloud's APIs on one address, over TLS, and
// on another the customer's console (see kmsim's Control). Keys are gone when it ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/test/kmsim"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8443", "`HOST:PORT` of the APIs; the certificate is for HOST")
	control := flag.String("control", "127.0.0.1:8444", "`HOST:PORT` of the console")
	caFile := flag.String("ca-file", "kmsim-ca.pem", "`FILE` to write the authority to, for ca_file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *listen, *control, *caFile); err != nil {
		fmt.Fprintln(os.Stderr, "kmsimd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen, control, caFile string) error {
	s, err := kmsim.Listen(listen)
	if err != nil {
		return err
	}
	if err := os.WriteFile(caFile, s.CAPEM, 0o644); err != nil {
		return errors.Join(err, s.Close())
	}
	console := &http.Server{Addr: control, Handler: s.Control(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- console.ListenAndServe() }()
	fmt.Printf("kmsim: APIs at %s, authority in %s, console at http://%s\n", s.URL(), caFile, control)
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	return errors.Join(err, console.Close(), s.Close())
}

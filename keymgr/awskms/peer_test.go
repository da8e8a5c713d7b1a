package awskms

import (
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// startLocalKMS runs local-kms. It speaks no TLS and gives no request ids: a proxy before it does.
func startLocalKMS(t *testing.T, binary string) (endpoint, caFile string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	l.Close()
	dir := t.TempDir()
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), "PORT="+port, "KMS_DATA_PATH="+filepath.Join(dir, "data"), "KMS_SEED_PATH="+filepath.Join(dir, "absent"), "KMS_REGION="+kmsim.Region)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			break
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("local-kms does not listen: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	n := 0
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: addr})
	proxy.ModifyResponse = func(r *http.Response) error {
		n++
		r.Header.Set("X-Amzn-Requestid", fmt.Sprintf("request-%d", n))
		return nil
	}
	front := httptest.NewTLSServer(proxy)
	t.Cleanup(front.Close)
	caFile = filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return front.URL, caFile
}

// atRegion is what a customer's own calls to AWS need.
func atRegion(o *kms.Options) { o.Region = kmsim.Region }

func newKey(t *testing.T, p *Provider) string {
	t.Helper()
	out, err := p.client.CreateKey(t.Context(), &kms.CreateKeyInput{}, atRegion)
	if err != nil {
		t.Fatal(err)
	}
	return *out.KeyMetadata.Arn
}

// TestConformanceWithLocalKMS holds the adapter against an AWS KMS that is not of this project.
func TestConformanceWithLocalKMS(t *testing.T) {
	isolate(t)
	binary := testenv.GoBuild(t, "../../test/kmsim/localkms", "github.com/nsmithuk/local-kms")
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		endpoint, ca := startLocalKMS(t, binary)
		p := open(t, Config{Endpoint: endpoint, CAFile: ca})
		arn := newKey(t, p)
		return providertest.Subject{
			Provider: p, CMK: arn, BindsAAD: true, NoVersions: true,
			Disable: func(t *testing.T) {
				if _, err := p.client.DisableKey(t.Context(), &kms.DisableKeyInput{KeyId: &arn}, atRegion); err != nil {
					t.Fatal(err)
				}
			},
			Enable: func(t *testing.T) {
				if _, err := p.client.EnableKey(t.Context(), &kms.EnableKeyInput{KeyId: &arn}, atRegion); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

// TestKmsimAgreesWithLocalKMS does the same to keys of both: what the adapter makes of the
// answers must be the same.
func TestKmsimAgreesWithLocalKMS(t *testing.T) {
	isolate(t)
	binary := testenv.GoBuild(t, "../../test/kmsim/localkms", "github.com/nsmithuk/local-kms")
	endpoint, ca := startLocalKMS(t, binary)
	sim, simCA := kmsimtest.Start(t)
	outcomes := make([][]string, 2)
	for i, p := range []*Provider{open(t, Config{Endpoint: endpoint, CAFile: ca}), open(t, Config{Endpoint: sim.URL(), CAFile: simCA})} {
		note := func(what string, err error) {
			said := what + ": ok"
			if err != nil {
				said = what + ": " + classify(err).String()
			}
			outcomes[i] = append(outcomes[i], said)
		}
		arn, other := newKey(t, p), newKey(t, p)
		w, err := p.Wrap(t.Context(), arn, ec, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		unwrap := func(what, cmk string, ec keymgr.EncryptionContext, b []byte) {
			_, err := p.client.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &cmk, CiphertextBlob: b, EncryptionContext: ec.Map()}, atRegion)
			note(what, err)
		}
		unwrap("its own", arn, ec, w.Ciphertext)
		unwrap("another key", other, ec, w.Ciphertext)
		unwrap("another context", arn, keymgr.EncryptionContext{Project: "p2", KEKVersion: 1}, w.Ciphertext)
		unwrap("a cut ciphertext", arn, ec, w.Ciphertext[:len(w.Ciphertext)-1])
		unwrap("an absent key", arn[:len(arn)-1]+"x", ec, w.Ciphertext)
		_, err = p.client.DisableKey(t.Context(), &kms.DisableKeyInput{KeyId: &arn}, atRegion)
		note("disabling", err)
		unwrap("disabled", arn, ec, w.Ciphertext)
		_, err = p.client.EnableKey(t.Context(), &kms.EnableKeyInput{KeyId: &arn}, atRegion)
		note("enabling", err)
		unwrap("enabled", arn, ec, w.Ciphertext)
		_, err = p.client.ScheduleKeyDeletion(t.Context(), &kms.ScheduleKeyDeletionInput{KeyId: &arn}, atRegion)
		note("scheduling deletion", err)
		_, err = p.Unwrap(t.Context(), arn, ec, w.Ciphertext)
		if o := outcomeOfProvider(err); o != keymgr.Denied {
			t.Errorf("service %d, deletion pending: %v", i, err)
		}
		_, err = p.client.CancelKeyDeletion(t.Context(), &kms.CancelKeyDeletionInput{KeyId: &arn}, atRegion)
		note("cancelling it", err)
		_, err = p.Unwrap(t.Context(), arn, ec, w.Ciphertext)
		// AWS leaves such a key disabled, local-kms enabled.
		if o := outcomeOfProvider(err); o != keymgr.Denied && i == 1 {
			t.Errorf("service %d, disabled after a deletion that was cancelled: %v", i, err)
		}
	}
	if diff := cmp.Diff(outcomes[0], outcomes[1]); diff != "" {
		t.Errorf("local-kms (-) and kmsim (+) differ: %s", diff)
	}
}

func outcomeOfProvider(err error) keymgr.Outcome {
	var pe *keymgr.ProviderError
	if errors.As(err, &pe) {
		return pe.Outcome
	}
	return keymgr.Unknown
}

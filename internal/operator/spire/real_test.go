package spire_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/operator/spire"
	"github.com/renewd/renewd/internal/refusal"
)

// realSPIRE is a spire-server process that can be restarted.
type realSPIRE struct {
	t    *testing.T
	dir  string
	stop func()
}

// newReal starts a SPIRE server; keyManager is "disk" or "memory".
func newReal(t *testing.T, keyManager, plugins string) *realSPIRE {
	t.Helper()
	if os.Getenv("SPIRE_BIN_DIR") == "" {
		t.Skip("set SPIRE_BIN_DIR to a folder with spire-server to run this test on a real SPIRE server")
	}
	dir, err := os.MkdirTemp("", "spire")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, number, _ := net.SplitHostPort(port.Addr().String())
	port.Close()
	keys := ""
	if keyManager == "disk" {
		keys = fmt.Sprintf("keys_path = %q", dir+"/keys.json")
	}
	config := fmt.Sprintf(`
server {
  bind_address = "127.0.0.1"
  bind_port = %q
  trust_domain = "example.org"
  data_dir = %q
  socket_path = %q
  log_level = "WARN"
  ca_ttl = "72h"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager %q { plugin_data { %s } }
  %s
}
`, number, dir, dir+"/api.sock", dir+"/db.sqlite3", keyManager, keys, strings.ReplaceAll(plugins, "DIR", dir))
	if err := os.WriteFile(dir+"/server.conf", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return &realSPIRE{t: t, dir: dir}
}

func (r *realSPIRE) start() {
	r.t.Helper()
	log, err := os.OpenFile(r.dir+"/server.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(os.Getenv("SPIRE_BIN_DIR"), "spire-server"), "run", "-config", r.dir+"/server.conf")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	stopped := false
	r.stop = func() {
		if !stopped {
			stopped = true
			cmd.Process.Kill()
			cmd.Wait()
			log.Close()
		}
	}
	r.t.Cleanup(func() {
		r.stop()
		if r.t.Failed() {
			out, _ := os.ReadFile(r.dir + "/server.log")
			r.t.Logf("spire-server:\n%s", out)
		}
	})
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	for {
		_, err := r.local().GetX509AuthorityState(ctx, &localv1.GetX509AuthorityStateRequest{})
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			r.t.Fatalf("spire-server does not answer: %v", err)
		}
	}
}

func (r *realSPIRE) restart() {
	r.t.Helper()
	r.stop()
	r.start()
}

func (r *realSPIRE) local() localv1.LocalAuthorityClient {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.dir+"/api.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return localv1.NewLocalAuthorityClient(conn)
}

func (r *realSPIRE) backend(c spire.Config) *spire.Backend {
	r.t.Helper()
	c.Sockets = []string{r.dir + "/api.sock"}
	return open(r.t, c)
}

func TestRotationOfSPIRE(t *testing.T) {
	t.Parallel()
	r := newReal(t, "disk", "")
	r.start()
	safe := false
	b := r.backend(spire.Config{TrustDomain: "example.org", Figures: figuresFunc(func(string, string, []string) (prom.Figures, error) {
		return prom.Figures{X509Safe: safe, JWTSafe: safe}, nil
	})})
	ctx := t.Context()
	first := wantRows(t, b, "Active/Active")
	a := first.Keysets[0]
	if d := time.Until(a.ExpiresAt); d < 71*time.Hour || d > 72*time.Hour || time.Since(a.IssuedAt) > time.Minute || first.TrustDomain != "example.org" {
		t.Errorf("first keyset %+v", a)
	}
	n, err := b.Prepare(ctx)
	must(t, err)
	if s := wantRows(t, b, "Active/Active Prepared/Prepared"); s.Sequence <= first.Sequence || s.Keysets[1].ID != n.ID {
		t.Errorf("prepared %+v, listed %+v", n, s)
	}
	wantRefusal := func(what string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, runbook.ErrOutcomeUnknown) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	_, err = b.Prepare(ctx)
	wantRefusal("prepare beside a prepared one", err, "room for one prepared key set")
	wantRefusal("taint a prepared one", b.Taint(ctx, n.ID), "taints only one that was active before")
	wantRefusal("taint the active one", b.Taint(ctx, a.ID), refusal.ErrTaintActive.Error())
	wantRefusal("remove the active one", b.Remove(ctx, a.ID, true), refusal.ErrRemoveActive.Error())
	r.restart()
	wantRows(t, b, "Active/Active Prepared/Prepared")
	must(t, b.Activate(ctx, n.ID))
	wantRows(t, b, "Prepared/Prepared Active/Active")
	wantRefusal("activate an old one", b.Activate(ctx, a.ID), "activates no old one")
	wantRefusal("remove an old one", b.Remove(ctx, a.ID, true), refusal.ErrRemovePrepared.Error())
	_, err = b.Prepare(ctx)
	wantRefusal("prepare beside an old one", err, "would forget "+a.ID)

	// A lost connection leaves one key tainted.
	_, err = r.local().TaintX509Authority(ctx, &localv1.TaintX509AuthorityRequest{AuthorityId: a.X509AuthorityID})
	must(t, err)
	wantRows(t, b, "Tainted/Prepared Active/Active")
	must(t, b.Taint(ctx, a.ID))
	s := wantRows(t, b, "Tainted/Tainted Active/Active")
	wantRefusal("taint again", b.Taint(ctx, a.ID), refusal.ErrTaintTainted.Error())
	wantRefusal("activate a tainted one", b.Activate(ctx, a.ID), refusal.ErrActivateTainted.Error())
	wantRefusal("remove an unsafe one", b.Remove(ctx, a.ID, false), "may still hold")
	r.restart()
	if after := wantRows(t, b, "Tainted/Tainted Active/Active"); after.Keysets[0].ID != a.ID || after.Sequence < s.Sequence {
		t.Errorf("after a restart %+v", after)
	}
	safe = true
	must(t, b.Remove(ctx, a.ID, false))
	if s := wantRows(t, b, "Active/Active"); s.Keysets[0].ID != n.ID {
		t.Errorf("left is %+v", s.Keysets[0])
	}
	wantRefusal("remove again", b.Remove(ctx, a.ID, true), refusal.ErrNotFound.Error())

	// The revoked authorities stay in their slots, and another rotation can begin.
	n, err = b.Prepare(ctx)
	must(t, err)
	// A lost connection leaves one key activated.
	_, err = r.local().ActivateX509Authority(ctx, &localv1.ActivateX509AuthorityRequest{AuthorityId: n.X509AuthorityID})
	must(t, err)
	wantRows(t, b, "Prepared/Active Active/Prepared")
	must(t, b.Activate(ctx, n.ID))
	s = wantRows(t, b, "Prepared/Prepared Active/Active")
	must(t, b.Taint(ctx, s.Keysets[0].ID))
	_, err = r.local().RevokeJWTAuthority(ctx, &localv1.RevokeJWTAuthorityRequest{AuthorityId: s.Keysets[0].JWTKeyID})
	must(t, err)
	wantRows(t, b, "Tainted/- Active/Active")
	// SPIRE prepares automatically and forgets the old authority.
	_, err = r.local().PrepareX509Authority(ctx, &localv1.PrepareX509AuthorityRequest{})
	must(t, err)
	if s := wantRows(t, b, "Active/Active Prepared/-"); len(s.Unowned) != 1 || !s.Unowned[0].Tainted {
		t.Errorf("in no slot: %+v", s.Unowned)
	}
	wantRefusal("remove a forgotten one", b.Remove(ctx, s.Keysets[0].ID, true), "let it expire")
}

func TestSPIREWithoutItsKeys(t *testing.T) {
	t.Parallel()
	r := newReal(t, "memory", "")
	r.start()
	b := r.backend(spire.Config{})
	a := wantRows(t, b, "Active/Active").Keysets[0]
	r.restart()
	if k := wantRows(t, b, "Active/Active").Keysets[0]; k.ID == a.ID {
		t.Errorf("the same keyset %+v", k)
	}
	if err := b.Taint(t.Context(), a.X509AuthorityID); err == nil || !strings.Contains(err.Error(), "not an authority of a given SPIRE server") {
		t.Errorf("taint a former authority: %v", err)
	}
}

func TestSPIREUnderAnUpstreamAuthority(t *testing.T) {
	t.Parallel()
	r := newReal(t, "memory", `UpstreamAuthority "disk" { plugin_data { cert_file_path = "DIR/up.pem" key_file_path = "DIR/up.key" } }`)
	upstreamCA(t, r.dir+"/up.pem", r.dir+"/up.key")
	r.start()
	b := r.backend(spire.Config{})
	a := wantRows(t, b, "Active/Active").Keysets[0]
	n, err := b.Prepare(t.Context())
	must(t, err)
	must(t, b.Activate(t.Context(), n.ID))
	wantRows(t, b, "Prepared/Prepared Active/Active")
	if err := b.Taint(t.Context(), a.ID); err == nil || !strings.Contains(err.Error(), "signs the X.509 authorities of this SPIRE server, so they cannot be tainted") {
		t.Errorf("taint: %v", err)
	}
	_, err = b.Prepare(t.Context())
	must(t, err)
	wantRows(t, b, "Active/Active Prepared/Prepared")
}

func upstreamCA(t *testing.T, certPath, keyPath string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "upstream"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(keyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
}

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/test/clitest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"server": main})
}

// TestScripts runs the command lines in testdata/script against operator services: a
// server during a rotation on the socket $ADMIN, one that cannot sign on $SICK, and one
// that rejects everything on $STRICT. The one on $LIVE is real, and one script uses it. There
// are web.crt and web.key, the certificate of a web server, old.crt and old.key, one that has
// expired, and other.crt and other.key. A process listens at $TAKEN.
func TestScripts(t *testing.T) {
	t.Parallel()
	l := newLive(t)
	clitest.Run(t, map[string]string{"EXAMPLE": "server.example.yaml", "ENTRIES": "entries.example.yaml"}, func(e *testscript.Env) {
		writePair(t, e.WorkDir, "web", time.Hour)
		writePair(t, e.WorkDir, "old", -time.Minute)
		writePair(t, e.WorkDir, "other", time.Hour)
		taken, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		e.Defer(func() { taken.Close() })
		e.Setenv("TAKEN", taken.Addr().String())
		e.Setenv("LIVE", l.socket)
		for name, service := range map[string]api.OperatorServer{"ADMIN": newFake(), "SICK": &fake{}, "STRICT": strict{}} {
			clitest.Serve(t, e, name, func(r grpc.ServiceRegistrar) { api.RegisterOperatorServer(r, service) })
		}
	})
}

// writePair writes NAME.crt, a certificate that expires after life, and NAME.key.
func writePair(t *testing.T, dir, name string, life time.Duration) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"server.example.org"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + ".crt": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func noEnv(string) string { return "" }

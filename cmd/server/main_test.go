package main

import (
	"testing"

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
// that rejects everything on $STRICT. The one on $LIVE is real, and one script uses it.
func TestScripts(t *testing.T) {
	t.Parallel()
	l := newLive(t)
	clitest.Run(t, map[string]string{"EXAMPLE": "server.example.yaml", "ENTRIES": "entries.example.yaml"}, func(e *testscript.Env) {
		e.Setenv("LIVE", l.socket)
		for name, service := range map[string]api.OperatorServer{"ADMIN": newFake(), "SICK": &fake{}, "STRICT": strict{}} {
			clitest.Serve(t, e, name, func(r grpc.ServiceRegistrar) { api.RegisterOperatorServer(r, service) })
		}
	})
}

func noEnv(string) string { return "" }

package spireapi_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// TestStockAgent runs an unmodified spire-agent with the server, in real time,
// through a rotation.
func TestStockAgent(t *testing.T) {
	bin := os.Getenv("SPIRE_BIN_DIR")
	if bin == "" {
		t.Skip("SPIRE_BIN_DIR is not set: it names a folder with spire-agent")
	}
	s := newServer(t, spireapi.Config{})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	served, end := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(served, lis) }()
	defer func() {
		end()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	// Enough entries for a sync by revisions; two are for this process.
	entries := many(600)
	for i := range entries {
		uid := os.Getuid()
		if i >= 2 {
			uid += 1000000
		}
		entries[i].Selectors = []spireapi.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}}
	}
	if _, err := s.ApplyEntries(ctx, entries, false); err != nil {
		t.Fatal(err)
	}
	token, err := s.CreateJoinToken(ctx, time.Minute, "")
	if err != nil {
		t.Fatal(err)
	}

	// Not t.TempDir: its path can be too long for a Unix socket.
	dir, err := os.MkdirTemp("", "stock")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "api.sock")
	config := fmt.Sprintf(`
agent {
  data_dir = %q
  server_address = "127.0.0.1"
  server_port = "%d"
  socket_path = %q
  trust_domain = %q
  trust_bundle_path = %q
  join_token = %q
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, dir, lis.Addr().(*net.TCPAddr).Port, socket, td.Name(), filepath.Join(dir, "bundle.pem"), token.Value)
	for name, content := range map[string][]byte{"agent.conf": []byte(config), "bundle.pem": s.BundlePEM()} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	agent := exec.CommandContext(ctx, filepath.Join(bin, "spire-agent"), "run", "-config", filepath.Join(dir, "agent.conf"))
	agent.Stdout, agent.Stderr = &log, &log
	agent.Cancel = func() error { return agent.Process.Signal(os.Interrupt) }
	agent.WaitDelay = 10 * time.Second
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = agent.Wait()
		if t.Failed() {
			t.Logf("the agent's log:\n%s", log.String())
		}
	}()

	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// signedBy waits until an authority has signed both SVIDs.
	signedBy := func(authority string) {
		t.Helper()
		seen := make(chan struct{})
		watch, stop := context.WithCancel(ctx)
		defer stop()
		w := &watcher{then: func(c *workloadapi.X509Context) {
			fresh := 0
			for _, svid := range c.SVIDs {
				if strings.EqualFold(fmt.Sprintf("%x", svid.Certificates[0].AuthorityKeyId), authority) {
					fresh++
				}
			}
			if fresh == 2 && len(c.SVIDs) == 2 {
				select {
				case <-seen:
				default:
					close(seen)
				}
			}
		}}
		ended := make(chan error, 1)
		go func() { ended <- client.WatchX509Context(watch, w) }()
		select {
		case <-seen:
		case <-ctx.Done():
			t.Errorf("no SVIDs by %s in time", authority)
		}
		stop()
		<-ended
	}
	keys := s.Keysets()
	old := keys.Active()
	signedBy(old.X509AuthorityID)
	if t.Failed() {
		return
	}
	token2, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "x", Subject: spiffeid.RequireFromPath(td, "/workload/e00000")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token2.Marshal(), "x"); err != nil {
		t.Errorf("validate JWT-SVID: %v", err)
	}
	next, err := keys.Prepare(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Activate(ctx, next.ID); err != nil {
		t.Fatal(err)
	}
	if err := keys.Taint(ctx, old.ID); err != nil {
		t.Fatal(err)
	}
	signedBy(next.X509AuthorityID)
}

type watcher struct {
	then func(*workloadapi.X509Context)
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.then(c) }
func (w *watcher) OnX509ContextWatchError(error)                  {}

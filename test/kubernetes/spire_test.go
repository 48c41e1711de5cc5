package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
)

const spireServer = `server {
  bind_address = "127.0.0.1"
  bind_port = "8081"
  trust_domain = "example.org"
  data_dir = %[1]q
  socket_path = "/run/renewd/spire-server.sock"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "%[1]s/store.sqlite3" } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
}
`

const spireAgent = `agent {
  server_address = "127.0.0.1"
  server_port = "8081"
  trust_domain = "example.org"
  data_dir = %[1]q
  socket_path = "/run/renewd/spire.sock"
  insecure_bootstrap = true
  log_level = "DEBUG"
  log_format = "JSON"
  log_file = "%[1]s/agent.log"
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "k8s" {
    plugin_data {
      node_name = %[2]q
      kubelet_ca_path = %[3]q
      certificate_path = %[4]q
      private_key_path = %[5]q
      max_poll_attempts = 5
    }
  }
}
`

// startSPIRE runs a SPIRE server and agent on the node, not in pods. It returns what the agent
// finds out about a process in a container that calls it.
func (c *cluster) startSPIRE(t *testing.T) (ask func(namespace, pod, container string) ([]string, error)) {
	t.Helper()
	bin := os.Getenv("SPIRE_BIN_DIR")
	if bin == "" {
		t.Skip("SPIRE_BIN_DIR is not set: run make spire, and set it to bin/spire")
	}
	dir := filepath.Join(c.dir, "spire")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll("/run/renewd", 0o755)); err != nil {
		t.Fatal(err)
	}
	config := func(name, text string, args ...any) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, fmt.Appendf(nil, text, args...), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	start := func(name string, args ...string) {
		p, err := c.run(name, filepath.Join(bin, name), args...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.stop)
	}
	start("spire-server", "run", "-config", config("server.conf", spireServer, dir))
	var token []byte
	err := until(30*time.Second, "a join token of spire-server", func() (err error) {
		token, err = exec.Command(filepath.Join(bin, "spire-server"), "token", "generate", "-output", "json",
			"-socketPath", "/run/renewd/spire-server.sock").Output()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var generated struct{ Value string }
	if err := json.Unmarshal(token, &generated); err != nil {
		t.Fatal(err)
	}
	start("spire-agent", "run", "-joinToken", generated.Value, "-config", config("agent.conf", spireAgent, dir, nodeName,
		c.pki.file("ca.pem"), c.pki.file("admin.pem"), c.pki.file("admin.key")))
	err = until(30*time.Second, "spire-agent", func() error {
		_, err := os.Stat("/run/renewd/spire.sock")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "agent.log")
	return func(namespace, pod, container string) ([]string, error) {
		before, err := os.ReadFile(log)
		if err != nil {
			return nil, err
		}
		_, err = c.kubectl("", "-n", namespace, "exec", pod, "-c", container, "--", "/workload", "ask", "unix:///run/renewd/spire.sock")
		if err != nil {
			return nil, err
		}
		after, err := os.ReadFile(log)
		if err != nil {
			return nil, err
		}
		return attested(after[len(before):])
	}
}

// attested returns the selectors that spire-agent logs at debug level.
func attested(log []byte) ([]string, error) {
	for line := range strings.Lines(string(log)) {
		var e struct {
			Msg       string
			Selectors []struct{ Type, Value string }
		}
		if !strings.Contains(line, "PID attested to have selectors") {
			continue
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, fmt.Errorf("log line %s: %w", line, err)
		}
		var out []string
		for _, s := range e.Selectors {
			out = append(out, s.Type+":"+s.Value)
		}
		slices.Sort(out)
		return out, nil
	}
	return nil, errors.New("spire-agent has logged no attestation")
}

// ours returns the selectors that our attestor finds for a process of the node.
func (c *cluster) ours(t *testing.T, a *kubernetes.Attestor, pid int) []string {
	t.Helper()
	peer := attest.NewInProcess(cache.Process{PID: pid}, 0, 0, func() error { return nil })
	selectors, err := a.Attest(t.Context(), peer)
	if err != nil {
		t.Errorf("process %d: %v", pid, err)
	}
	var out []string
	for _, s := range selectors {
		out = append(out, s.Type+":"+s.Value)
	}
	slices.Sort(out)
	return out
}

// compareSelectors compares our attestor with SPIRE's: for each container the same selectors.
// An ephemeral container, which has no socket to ask SPIRE at, gets none from us.
func (c *cluster) compareSelectors(t *testing.T, all []process) {
	ask := c.startSPIRE(t)
	a, err := kubernetes.New(kubernetes.Config{
		NodeName: nodeName, KubeletHost: nodeIP, KubeletCAFile: c.pki.file("ca.pem"),
		CertificateFile: c.pki.file("admin.pem"), PrivateKeyFile: c.pki.file("admin.key"),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for _, p := range all {
		if p.container == "debug" {
			if ours := c.ours(t, a, p.pid); len(ours) > 0 {
				t.Errorf("the ephemeral container has %s", ours)
			}
			continue
		}
		theirs, err := ask("shop", p.pod, p.container)
		if err != nil {
			t.Errorf("%s/%s: %v", p.pod, p.container, err)
			continue
		}
		if ours := c.ours(t, a, p.pid); !slices.Equal(ours, theirs) {
			t.Errorf("%s/%s:\nours   %s\ntheirs %s", p.pod, p.container, strings.Join(ours, "\n       "), strings.Join(theirs, "\n       "))
		}
		if len(theirs) == 0 {
			t.Errorf("%s/%s has no selectors", p.pod, p.container)
		}
	}
}

package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const entriesExample = `    entries:
      - id: web
        spiffe_id: spiffe://example.org/web
        selectors:
          - k8s:ns:shop
          - k8s:sa:web
`

// disk is the volume that the server's claim binds: a folder of the node.
const disk = `apiVersion: v1
kind: PersistentVolume
metadata:
  name: disk
spec:
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: %q}
  nodeAffinity:
    required:
      nodeSelectorTerms:
        - matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]
`

// deployServer applies deploy/server.kubernetes.yaml as its comments say, with these entries.
func (c *cluster) deployServer(t *testing.T, entries string) {
	t.Helper()
	namespace, rest, _ := strings.Cut(manifest(t, "server.kubernetes.yaml"), "\n---\n")
	c.apply(t, namespace)
	key := filepath.Join(t.TempDir(), "store.key")
	if err := command(filepath.Join(c.dir, "bin", "server"), "key", "new", key); err != nil {
		t.Fatal(err)
	}
	c.must(t, "-n", "renewd-server", "create", "secret", "generic", "renewd-store-key", "--from-file=renewd-store-key="+key)
	folder := filepath.Join(c.dir, "disk")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	c.apply(t, fmt.Sprintf(disk, folder, nodeName))
	c.apply(t, replace(t, rest, entriesExample, indent(entries, "    ")))
	c.must(t, "-n", "renewd-server", "rollout", "status", "statefulset/renewd-server", "--timeout=120s")
	c.server(t, "/server", "entries", "apply", "/etc/renewd/config/entries.yaml")
}

// deployAgent applies deploy/daemonset.yaml as its comments say. There is no DNS in the cluster,
// so the pods get the server's name in their hosts file.
func (c *cluster) deployAgent(t *testing.T) {
	t.Helper()
	text := manifest(t, "daemonset.yaml")
	address := c.must(t, "-n", "renewd-server", "get", "service", "renewd-server", "-o", "jsonpath={.spec.clusterIP}")
	text = replace(t, text, "server.example.org:8081", "renewd-server.renewd-server.svc:8081")
	text = replace(t, text, "    # the server's trust bundle\n", indent(c.server(t, "/server", "bundle"), "    "))
	text = replace(t, text, "      hostPID: true\n", fmt.Sprintf(`      hostPID: true
      hostAliases:
        - {ip: %s, hostnames: [renewd-server.renewd-server.svc]}
`, address))
	c.apply(t, text)
	c.must(t, "-n", "renewd", "rollout", "status", "daemonset/renewd-agent", "--timeout=120s")
}

// server runs a program in the server's pod.
func (c *cluster) server(t *testing.T, args ...string) string {
	t.Helper()
	return c.must(t, append([]string{"-n", "renewd-server", "exec", "renewd-server-0", "--"}, args...)...)
}

// manifest reads a file of deploy.
func manifest(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// replace replaces what a manifest must have.
func replace(t *testing.T, text, old, by string) string {
	t.Helper()
	if !strings.Contains(text, old) {
		t.Fatalf("the manifest has no %q", old)
	}
	return strings.Replace(text, old, by, 1)
}

func indent(text, by string) string {
	var out strings.Builder
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		out.WriteString(by + line)
	}
	return out.String()
}

// apply applies a manifest. A new namespace has no service account for a moment.
func (c *cluster) apply(t *testing.T, text string) {
	t.Helper()
	err := until(20*time.Second, "what is applied", func() error {
		_, err := c.kubectl(text, "apply", "-f", "-")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// testdata reads a manifest of the tests.
func testdata(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// event is a line that a workload prints.
type event struct {
	SPIFFEID    string `json:"spiffe_id"`
	AuthorityID string `json:"authority_id"`
	Serial      string
	Error       string
	Time        time.Time
}

// events returns what the workload in a container has printed.
func (c *cluster) events(pod, container string) ([]event, error) {
	out, err := c.kubectl("", "-n", "shop", "logs", pod, "-c", container)
	if err != nil {
		return nil, err
	}
	var events []event
	for line := range strings.Lines(out) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, fmt.Errorf("%s printed %q: %w", pod, line, err)
		}
		events = append(events, e)
	}
	return events, nil
}

// holds waits until a workload's newest event is an SVID with this ID, of this authority unless
// that is empty.
func (c *cluster) holds(t *testing.T, pod, container, id, authority string) {
	t.Helper()
	err := until(90*time.Second, id+" in "+pod+"/"+container, func() error {
		events, err := c.events(pod, container)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			return errors.New("no SVID and no error yet")
		}
		last := events[len(events)-1]
		if last.SPIFFEID != id || authority != "" && last.AuthorityID != authority {
			return fmt.Errorf("the last event is %+v", last)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// keysets are the signing keys as "keysetctl list -o json" has them.
type keysets struct {
	Agents  int
	Behind  int `json:"agents_behind"`
	Keysets []struct {
		ID, State       string
		X509AuthorityID string `json:"x509_authority_id"`
	}
}

func (c *cluster) keysets(t *testing.T) keysets {
	t.Helper()
	var list keysets
	if err := json.Unmarshal([]byte(c.server(t, "/keysetctl", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// keyset returns the ID and the X.509 authority of the one keyset in a state.
func (k keysets) keyset(t *testing.T, state string) (id, authority string) {
	t.Helper()
	for _, ks := range k.Keysets {
		if ks.State == state {
			id, authority = ks.ID, ks.X509AuthorityID
		}
	}
	if id == "" {
		t.Fatalf("no keyset is %s: %+v", state, k)
	}
	return id, authority
}

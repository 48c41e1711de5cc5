package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// entries are those of the workloads, and as many more as make a wave of some seconds.
func entries() string {
	var out strings.Builder
	out.WriteString(`entries:
  - id: web
    spiffe_id: spiffe://example.org/shop/web
    selectors: ["k8s:ns:shop", "k8s:sa:web", "k8s:pod-label:app:web"]
  - id: first
    spiffe_id: spiffe://example.org/shop/pair/first
    selectors: ["k8s:ns:shop", "k8s:sa:pair", "k8s:container-name:first"]
  - id: second
    spiffe_id: spiffe://example.org/shop/pair/second
    selectors: ["k8s:ns:shop", "k8s:sa:pair", "k8s:container-name:second"]
`)
	for n := range 200 {
		fmt.Fprintf(&out, "  - {id: other-%d, spiffe_id: 'spiffe://example.org/other/%[1]d', selectors: ['k8s:ns:other', 'k8s:sa:other-%[1]d']}\n", n)
	}
	return out.String()
}

// workloads are the containers of testdata/workloads.yaml that have an identity.
var workloads = []struct{ pod, container, id string }{
	{"web", "main", "spiffe://example.org/shop/web"},
	{"pair", "first", "spiffe://example.org/shop/pair/first"},
	{"pair", "second", "spiffe://example.org/shop/pair/second"},
}

// TestSystem runs the server and the agent as deploy has them: the node joins by what it is,
// pods get the identities of their entries, and keep them over a rotation during which the
// agent's pod is replaced.
func TestSystem(t *testing.T) {
	c := onNode(t)
	c.deployServer(t, entries())
	c.deployAgent(t)
	c.apply(t, testdata(t, "workloads.yaml"))
	t.Cleanup(func() { c.must(t, "delete", "namespace", "shop", "--wait=false") })

	t.Run("node", func(t *testing.T) {
		if agents, id := c.server(t, "/server", "agent", "list"), agentID(t, c); !strings.Contains(agents, id) {
			t.Errorf("the agent is not %s:\n%s", id, agents)
		}
	})
	t.Run("workloads", func(t *testing.T) {
		for _, w := range workloads {
			c.holds(t, w.pod, w.container, w.id, "")
		}
	})
	t.Run("permissions", func(t *testing.T) { c.permissions(t) })
	t.Run("unknown", func(t *testing.T) { c.denied(t, "unknown", "main") })
	t.Run("rotation", func(t *testing.T) { c.rotate(t) })
	t.Run("token", func(t *testing.T) { c.replaceToken(t) })
}

// permissions: the agent's account may read the list of pods, and nothing else of the kubelet;
// with nodes/proxy instead, as before Kubernetes 1.33, it may read all.
func (c *cluster) permissions(t *testing.T) {
	agent := c.must(t, "-n", "renewd", "get", "pods", "-o", "name")
	check := c.must(t, "-n", "renewd", "exec", strings.TrimSpace(agent), "--", "/agent", "config", "check", "--config", "/etc/renewd/config/agent.yaml")
	if !strings.HasSuffix(check, ": ok\n") {
		t.Errorf("agent config check: %s", check)
	}
	for _, account := range []struct {
		name, resource string
		want           map[string]int
	}{
		{"renewd-agent", "", map[string]int{"/pods": 200, "/metrics": 403, "/configz": 403, "/run/shop/web/main": 403}},
		{"proxy", "nodes/proxy", map[string]int{"/pods": 200, "/configz": 200}},
		{"none", "", map[string]int{"/pods": 403}},
	} {
		if account.name != "renewd-agent" {
			c.must(t, "-n", "renewd", "create", "serviceaccount", account.name)
		}
		if account.resource != "" {
			c.must(t, "create", "clusterrole", account.name, "--verb=get", "--resource="+account.resource)
			c.must(t, "create", "clusterrolebinding", account.name, "--clusterrole="+account.name, "--serviceaccount=renewd:"+account.name)
		}
		token := strings.TrimSpace(c.must(t, "-n", "renewd", "create", "token", account.name))
		for path, want := range account.want {
			err := until(20*time.Second, fmt.Sprintf("%d for %s of %s", want, path, account.name), func() error {
				return c.get("https://"+nodeIP+":10250"+path, token, want)
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// denied fails unless the workload is refused, and has had no SVID.
func (c *cluster) denied(t *testing.T, pod, container string) {
	t.Helper()
	var events []event
	err := until(time.Minute, "a refusal", func() (err error) {
		if events, err = c.events(pod, container); err == nil && len(events) == 0 {
			err = fmt.Errorf("no event")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.SPIFFEID != "" || !strings.Contains(e.Error, "PermissionDenied") {
			t.Errorf("%s/%s: %+v", pod, container, e)
		}
	}
}

// rotate replaces the keyset by the runbook's steps, and the agent's pod while its wave runs.
func (c *cluster) rotate(t *testing.T) {
	old, _ := c.keysets(t).keyset(t, "Active")
	c.server(t, "/keysetctl", "prepare")
	next, authority := c.keysets(t).keyset(t, "Prepared")
	err := until(time.Minute, "the bundle on every node", func() error {
		if list := c.keysets(t); list.Agents == 0 || list.Behind > 0 {
			return fmt.Errorf("%d of %d agents are behind", list.Behind, list.Agents)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c.server(t, "/keysetctl", "activate", next)
	c.server(t, "/keysetctl", "taint", old)

	// The wave takes ten seconds, after a delay of up to a minute.
	agent := c.must(t, "-n", "renewd", "get", "pods", "-o", "name")
	err = until(2*time.Minute, "the wave", func() error {
		if left := c.tainted(t, old); left > 150 {
			return fmt.Errorf("%d SVIDs of the tainted keyset", left)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c.must(t, "-n", "renewd", "delete", strings.TrimSpace(agent))
	if left := c.tainted(t, old); left == 0 {
		t.Error("the wave was over before the agent's pod was replaced")
	}
	c.must(t, "-n", "renewd", "rollout", "status", "daemonset/renewd-agent", "--timeout=120s")
	if _, err := c.kubectl("", "-n", "renewd-server", "exec", "renewd-server-0", "--", "/keysetctl", "wait", old, "--timeout", "5m"); err != nil {
		log, _ := c.kubectl("", "-n", "renewd", "logs", "daemonset/renewd-agent")
		t.Fatalf("%v\nthe agent's log:\n%s", err, log)
	}
	c.server(t, "/keysetctl", "remove", old)
	for _, w := range workloads {
		c.holds(t, w.pod, w.container, w.id, authority)
	}
}

// tainted is the number of X.509-SVIDs that depend on a keyset.
func (c *cluster) tainted(t *testing.T, keyset string) int {
	t.Helper()
	var list struct {
		Keysets []struct {
			ID        string
			X509SVIDs int `json:"x509_svids"`
		}
	}
	if err := json.Unmarshal([]byte(c.server(t, "/keysetctl", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	for _, ks := range list.Keysets {
		if ks.ID == keyset {
			return ks.X509SVIDs
		}
	}
	t.Fatalf("keyset %s is not listed", keyset)
	return 0
}

// replaceToken makes the tokens invalid that the agent's pod has. The kubelet writes others.
// With them the agent, evicted from the server, joins again, and attests a new pod.
func (c *cluster) replaceToken(t *testing.T) {
	pod := c.must(t, "-n", "renewd", "get", "pods", "-o", "jsonpath={.items[0].metadata.uid}")
	file := filepath.Join("/var/lib/kubelet/pods", pod, "volumes/kubernetes.io~projected/token/spire-agent")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	// A token is of one account, which its UID names, and a kubelet forgets the tokens that
	// it has asked for when it ends.
	c.must(t, "-n", "renewd", "delete", "serviceaccount", "renewd-agent")
	c.must(t, "-n", "renewd", "create", "serviceaccount", "renewd-agent")
	c.kubelet.stop()
	if err := c.runKubelet(); err != nil {
		t.Fatal(err)
	}
	err = until(time.Minute, "another token", func() error {
		after, err := os.ReadFile(file)
		if err == nil && bytes.Equal(before, after) {
			err = fmt.Errorf("%s is as before", file)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	id := agentID(t, c)
	c.server(t, "/server", "agent", "evict", id)
	err = until(time.Minute, "the agent", func() error {
		if agents := c.server(t, "/server", "agent", "list"); !strings.Contains(agents, id) {
			return fmt.Errorf("it is not in %s", agents)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c.must(t, "-n", "shop", "delete", "pod", "web")
	c.apply(t, testdata(t, "workloads.yaml"))
	c.holds(t, "web", "main", "spiffe://example.org/shop/web", "")
}

// agentID is the SPIFFE ID of the node's agent.
func agentID(t *testing.T, c *cluster) string {
	t.Helper()
	return "spiffe://example.org/spire/agent/k8s_psat/example/" + c.must(t, "get", "node", nodeName, "-o", "jsonpath={.metadata.uid}")
}

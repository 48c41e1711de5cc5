package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	apiServer        = "https://" + nodeIP + ":6443"
	containerdSocket = "/run/containerd/containerd.sock"
	pauseImage       = "renewd.test/workload:dev"
)

// cluster is a control plane and one node, all of it in this process's namespaces.
type cluster struct {
	dir, binDir string
	pki         *pki
	kubelet     *component
}

// component is a process of the cluster.
type component struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
}

func (p *component) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	<-p.ended
}

// start makes this process's namespaces a node, and brings up etcd, the control plane and the
// kubelet. It returns when the node is ready to run pods of the images that it imported.
func start(dir, binDir string) (*cluster, error) {
	if err := prepareNode(dir); err != nil {
		return nil, err
	}
	ca, err := newPKI(filepath.Join(dir, "pki"))
	if err != nil {
		return nil, err
	}
	c := &cluster{dir: dir, binDir: binDir, pki: ca}
	for _, sub := range []string{"log", "images", "cni", "static-pods"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	if err := c.issueAll(); err != nil {
		return nil, err
	}
	var g errgroup.Group
	g.Go(c.startControlPlane)
	g.Go(func() error {
		if err := c.startContainerd(); err != nil {
			return err
		}
		return c.importImages()
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return c, c.startKubelet()
}

func (c *cluster) issueAll() error {
	return errors.Join(
		c.pki.issueServer("kube-apiserver", []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc"}, nodeIP, "10.96.0.1", "127.0.0.1"),
		c.pki.issueServer("kubelet-server", []string{nodeName}, nodeIP),
		c.pki.issueClient("admin", apiServer, "admin", "system:masters"),
		// What the API server shows a kubelet.
		c.pki.issueClient("kubelet-client", apiServer, "kube-apiserver", "system:masters"),
		c.pki.issueClient("controller-manager", apiServer, "system:kube-controller-manager"),
		c.pki.issueClient("scheduler", apiServer, "system:kube-scheduler"),
		c.pki.issueClient("proxy", apiServer, "system:kube-proxy"),
		c.pki.issueClient("kubelet", apiServer, "system:node:"+nodeName, "system:nodes"),
	)
}

func (c *cluster) startControlPlane() error {
	_, err := c.run("etcd", "etcd",
		"--data-dir="+filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380")
	if err != nil {
		return err
	}
	_, err = c.run("kube-apiserver", c.tool("kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address="+nodeIP, "--secure-port=6443",
		"--service-cluster-ip-range="+serviceCIDR,
		"--tls-cert-file="+c.pki.file("kube-apiserver.pem"), "--tls-private-key-file="+c.pki.file("kube-apiserver.key"),
		"--client-ca-file="+c.pki.file("ca.pem"),
		"--kubelet-preferred-address-types=InternalIP", "--kubelet-certificate-authority="+c.pki.file("ca.pem"),
		"--kubelet-client-certificate="+c.pki.file("kubelet-client.pem"), "--kubelet-client-key="+c.pki.file("kubelet-client.key"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.pki.file("service-account.pem"), "--service-account-signing-key-file="+c.pki.file("service-account.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true")
	if err != nil {
		return err
	}
	err = until(time.Minute, "the API server", func() error { return c.get(apiServer+"/readyz", "", http.StatusOK) })
	if err != nil {
		return err
	}
	_, err = c.run("kube-controller-manager", c.tool("kube-controller-manager"),
		"--kubeconfig="+c.pki.file("controller-manager.kubeconfig"), "--leader-elect=false",
		"--root-ca-file="+c.pki.file("ca.pem"), "--service-account-private-key-file="+c.pki.file("service-account.key"),
		"--use-service-account-credentials=true")
	if err != nil {
		return err
	}
	_, err = c.run("kube-scheduler", c.tool("kube-scheduler"),
		"--kubeconfig="+c.pki.file("scheduler.kubeconfig"), "--leader-elect=false")
	if err != nil {
		return err
	}
	_, err = c.run("kube-proxy", c.tool("kube-proxy"),
		"--kubeconfig="+c.pki.file("proxy.kubeconfig"), "--hostname-override="+nodeName, "--proxy-mode=nftables",
		"--cluster-cidr="+podCIDR,
		// The kernel has one table of connections, whose size is not ours to change.
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	return err
}

func (c *cluster) startContainerd() error {
	plugins, err := cniPlugins()
	if err != nil {
		return err
	}
	network := fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": {
"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, podCIDR)
	if err := os.WriteFile(filepath.Join(c.dir, "cni", "10-pods.conflist"), []byte(network), 0o644); err != nil {
		return err
	}
	config := fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  # Without CAP_SYS_RESOURCE runc cannot lower the score, and ends without a word.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, containerdSocket, pauseImage, plugins, filepath.Join(c.dir, "cni"))
	file := filepath.Join(c.dir, "containerd.toml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return err
	}
	if _, err := c.run("containerd", "containerd", "--config="+file); err != nil {
		return err
	}
	return until(30*time.Second, "containerd", func() error { return c.ctr("version") })
}

func cniPlugins() (string, error) {
	for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni"} {
		if _, err := os.Stat(filepath.Join(dir, "ptp")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("no CNI plugins: install the Debian package containernetworking-plugins")
}

// buildPrograms builds what is in the images, static as the images of deploy/Dockerfile need it.
func buildPrograms(dir string) error {
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "bin")+"/",
		"../../cmd/agent", "../../cmd/server", "../../cmd/keysetctl", "./workload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return nil
}

// importImages imports the images of deploy/Dockerfile and of the tests' workload.
func (c *cluster) importImages() error {
	bin := filepath.Join(c.dir, "bin")
	for _, i := range []image{
		{
			ref: pauseImage, entrypoint: []string{"/workload", "pause"},
			files: map[string]string{"workload": filepath.Join(bin, "workload")},
		},
		{
			ref: "docker.io/library/renewd-agent:dev", entrypoint: []string{"/agent"},
			files: map[string]string{"agent": filepath.Join(bin, "agent")},
		},
		{
			ref: "docker.io/library/renewd-server:dev", entrypoint: []string{"/server"}, user: 65532,
			files: map[string]string{"server": filepath.Join(bin, "server"), "keysetctl": filepath.Join(bin, "keysetctl")},
			dirs:  map[string]int64{"var/lib/renewd-server": 0o700, "run/renewd-server": 0o755},
		},
	} {
		file := filepath.Join(c.dir, "images", digest([]byte(i.ref))+".tar")
		if err := i.write(file); err != nil {
			return err
		}
		if err := c.ctr("--namespace=k8s.io", "images", "import", file); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) ctr(args ...string) error {
	return command("ctr", append([]string{"--address=" + containerdSocket}, args...)...)
}

func (c *cluster) startKubelet() error {
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[1]q}
authorization: {mode: Webhook}
tlsCertFile: %[2]q
tlsPrivateKeyFile: %[3]q
containerRuntimeEndpoint: unix://%[4]s
staticPodPath: %[5]q
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: ""
# A full disk of the machine is not what is tested.
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, imagefs.available: 0%%}
imageGCHighThresholdPercent: 100
# So that a projected token is replaced soon after it is due.
syncFrequency: 5s
`, c.pki.file("ca.pem"), c.pki.file("kubelet-server.pem"), c.pki.file("kubelet-server.key"), containerdSocket,
		filepath.Join(c.dir, "static-pods"))
	if err := os.WriteFile(filepath.Join(c.dir, "kubelet.yaml"), []byte(config), 0o644); err != nil {
		return err
	}
	return c.runKubelet()
}

// runKubelet starts the kubelet and waits until the node is ready.
func (c *cluster) runKubelet() (err error) {
	c.kubelet, err = c.run("kubelet", c.tool("kubelet"), "--config="+filepath.Join(c.dir, "kubelet.yaml"),
		"--kubeconfig="+c.pki.file("kubelet.kubeconfig"), "--hostname-override="+nodeName, "--node-ip="+nodeIP)
	if err != nil {
		return err
	}
	return until(time.Minute, "node", func() error {
		_, err := c.kubectl("", "wait", "--for=condition=Ready", "--timeout=1s", "node/"+nodeName)
		return err
	})
}

// tool is the path of a program of Kubernetes.
func (c *cluster) tool(name string) string { return filepath.Join(c.binDir, name) }

// run starts a component, which runs until it is stopped or the PID namespace ends.
func (c *cluster) run(name, program string, args ...string) (*component, error) {
	log, err := os.OpenFile(filepath.Join(c.dir, "log", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &component{cmd: exec.Command(program, args...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// get asks a server of the cluster, as the administrator or with a token, and fails unless the
// status is the wanted one.
func (c *cluster) get(url, token string, want int) error {
	ca, err := os.ReadFile(c.pki.file("ca.pem"))
	if err != nil {
		return err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(ca)
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	} else if config.Certificates, err = c.pki.load("admin"); err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
	resp, err := (&http.Client{Timeout: 5 * time.Second, Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != want {
		return errors.New(resp.Status)
	}
	return nil
}

// kubectl runs kubectl as the cluster's administrator.
func (c *cluster) kubectl(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.tool("kubectl"), append([]string{"--kubeconfig=" + c.pki.file("admin.kubeconfig")}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, &stderr, &stdout)
	}
	return stdout.String(), nil
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// until repeats a check until it succeeds.
func until(limit time.Duration, what string, check func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(200 * time.Millisecond) {
		err := check()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not there after %v: %w", what, limit, err)
		}
	}
}

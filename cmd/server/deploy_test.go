package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/seal"
)

// TestUnitFitsServer: the unit sets variables that exist, loads the right credential, and
// does not restart the server after a permanent error.
func TestUnitFitsServer(t *testing.T) {
	t.Parallel()
	unit := string(deployFile(t, "renewd-server.service"))
	names := regexp.MustCompile(`(?m)^Environment=(\w+)=`).FindAllStringSubmatch(unit, -1)
	if len(names) == 0 {
		t.Error("no Environment= found")
	}
	for _, m := range names {
		if m[1] != "GOTRACEBACK" && !slices.ContainsFunc(fields, func(f config.Field[settings]) bool { return schema.Variable(&f) == m[1] }) {
			t.Errorf("%s is not a field's variable", m[1])
		}
	}
	for _, want := range []string{
		"\nRestart=always\n",
		"\nEnvironment=GOTRACEBACK=crash\n", // otherwise a crash exits with cli.ExitPermanent
		"\nRestartPreventExitStatus=" + strconv.Itoa(cli.ExitPermanent) + "\n",
		"\nLoadCredentialEncrypted=" + seal.CredentialName + ":",
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if !strings.Contains(usage+keyUsage, seal.CredentialName) {
		t.Errorf("the help does not name %s", seal.CredentialName)
	}
}

// manifest has the fields of server.kubernetes.yaml that are tested.
type manifest struct {
	Kind     string
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Data map[string]string
	Spec struct {
		Replicas    int
		ServiceName string `yaml:"serviceName"`
		Selector    any    // of the service: labels; of the set: matchLabels
		Ports       []struct {
			Port       int
			TargetPort string `yaml:"targetPort"`
		}
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     struct {
				SecurityContext map[string]any `yaml:"securityContext"`
				Containers      []struct {
					Args  []string
					Env   []struct{ Name, Value string }
					Ports []struct {
						Name          string
						ContainerPort int `yaml:"containerPort"`
					}
					StartupProbe    probe          `yaml:"startupProbe"`
					LivenessProbe   probe          `yaml:"livenessProbe"`
					ReadinessProbe  probe          `yaml:"readinessProbe"`
					SecurityContext map[string]any `yaml:"securityContext"`
					VolumeMounts    []mount        `yaml:"volumeMounts"`
				}
				Volumes []struct {
					Name   string
					Secret struct {
						DefaultMode int `yaml:"defaultMode"`
					}
				}
			}
		}
		VolumeClaimTemplates []struct{ Metadata struct{ Name string } } `yaml:"volumeClaimTemplates"`
	}
}

type mount struct {
	Name      string
	MountPath string `yaml:"mountPath"`
}

type probe struct {
	HTTPGet struct{ Path, Port string } `yaml:"httpGet"`
}

func TestStatefulSetFitsServer(t *testing.T) {
	t.Parallel()
	byKind := map[string]manifest{}
	dec := yaml.NewDecoder(bytes.NewReader(deployFile(t, "server.kubernetes.yaml")))
	for {
		var m manifest
		err := dec.Decode(&m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		inNamespace := m.Kind != "Namespace" && !strings.HasPrefix(m.Kind, "Cluster")
		if inNamespace && m.Metadata.Namespace != byKind["Namespace"].Metadata.Name {
			t.Errorf("%s is in namespace %q", m.Kind, m.Metadata.Namespace)
		}
		byKind[m.Kind] = m
	}
	data := byKind["ConfigMap"].Data
	cfg, err := schema.Load("server.yaml", []byte(data["server.yaml"]), nil, noEnv)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseEntries("entries.yaml", []byte(data["entries.yaml"])); err != nil {
		t.Error(err)
	}

	set := byKind["StatefulSet"].Spec
	pod := set.Template.Spec
	if set.Replicas != 1 || set.ServiceName != byKind["Service"].Metadata.Name || len(pod.Containers) != 1 {
		t.Fatalf("%d replicas, service %s, %d containers", set.Replicas, set.ServiceName, len(pod.Containers))
	}
	c := pod.Containers[0]
	labels := set.Template.Metadata.Labels
	service, matched := fmt.Sprint(byKind["Service"].Spec.Selector), fmt.Sprint(set.Selector)
	if want := fmt.Sprint(labels); len(labels) == 0 || service != want || matched != fmt.Sprintf("map[matchLabels:%s]", want) {
		t.Errorf("pods have labels %v; the set selects %s, the service %s", labels, matched, service)
	}

	// Every listener has a port of the pod, and every one except metrics a port of the
	// service.
	ports := map[string]int{}
	for _, p := range c.Ports {
		ports[p.Name] = p.ContainerPort
	}
	want := map[string]int{
		"agents":  port(t, cfg.Deployments["default"].ListenAddress),
		"bundle":  port(t, cfg.EndpointAddress),
		"metrics": port(t, cfg.MetricsAddress),
	}
	if !maps.Equal(ports, want) {
		t.Errorf("ports %v, the configuration has %v", ports, want)
	}
	delete(want, "metrics")
	for _, p := range byKind["Service"].Spec.Ports {
		if want[p.TargetPort] != p.Port {
			t.Errorf("port %d of the service leads to %s", p.Port, p.TargetPort)
		}
		delete(want, p.TargetPort)
	}
	if len(want) > 0 {
		t.Errorf("the service leaves out %v", want)
	}
	for name, p := range map[string]probe{"/live": c.LivenessProbe, "/ready": c.ReadinessProbe} {
		if p.HTTPGet.Path != name || p.HTTPGet.Port != "metrics" || c.StartupProbe.HTTPGet.Path != "/live" {
			t.Errorf("probes %v, at the start %v", p, c.StartupProbe)
		}
	}

	// The user is that of the image, can open the volumes, and is a manager.
	user := pod.SecurityContext["runAsUser"]
	if user != pod.SecurityContext["fsGroup"] || pod.SecurityContext["runAsNonRoot"] != true ||
		!strings.Contains(string(deployFile(t, "Dockerfile")), fmt.Sprintf("USER %[1]v:%[1]v\nVOLUME %s\n", user, cfg.DataDir)) {
		t.Errorf("security context %v does not fit the image", pod.SecurityContext)
	}
	if !slices.Contains(cfg.Managers, fmt.Sprintf("unix:uid:%v", user)) {
		t.Errorf("operators.managers %v are not the user of the pod, %v", cfg.Managers, user)
	}
	if c.SecurityContext["readOnlyRootFilesystem"] != true || c.SecurityContext["allowPrivilegeEscalation"] != false {
		t.Errorf("security context %v", c.SecurityContext)
	}

	volumes := map[string]bool{}
	for _, v := range pod.Volumes {
		volumes[v.Name] = true
		if v.Name == "key" && v.Secret.DefaultMode != 0o440 {
			t.Errorf("the key has mode %04o: a group may read it, others may not", v.Secret.DefaultMode)
		}
	}
	for _, v := range set.VolumeClaimTemplates {
		volumes[v.Metadata.Name] = true
	}
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	if cfg.KeyFile != "" || env["CREDENTIALS_DIRECTORY"] == "" || env["RENEWD_ADMIN_SOCKET"] != cfg.AdminSocket {
		t.Errorf("key_file %s, admin_socket %s, environment %v", cfg.KeyFile, cfg.AdminSocket, env)
	}
	needed := []string{cfg.DataDir, filepath.Dir(filepath.Dir(cfg.AdminSocket)), c.Args[2], env["CREDENTIALS_DIRECTORY"]}
	for _, path := range needed {
		if !slices.ContainsFunc(c.VolumeMounts, func(m mount) bool {
			return volumes[m.Name] && (path == m.MountPath || strings.HasPrefix(path, m.MountPath+"/"))
		}) {
			t.Errorf("%s is in no volume", path)
		}
	}
	if !strings.Contains(string(deployFile(t, "server.kubernetes.yaml")), "--from-file="+seal.CredentialName+"=") {
		t.Errorf("the secret is not made with the item %s", seal.CredentialName)
	}
}

func port(t *testing.T, address string) int {
	t.Helper()
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func deployFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

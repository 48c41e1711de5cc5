package main

import (
	"bytes"
	"errors"
	"io"
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
)

func deployFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The unit sets existing variables only, and prevents restarts after the exit codes
// that would repeat.
func TestUnitFitsAgent(t *testing.T) {
	t.Parallel()
	unit := string(deployFile(t, "renewd-agent.service"))
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
		"\nRestartPreventExitStatus=" + strconv.Itoa(cli.ExitPermanent) + "\n",
		"\nEnvironment=GOTRACEBACK=crash\n", // else a crash ends with cli.ExitPermanent
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("%q is missing", want)
		}
	}
}

// manifest has the parts of daemonset.yaml that the tests check.
type manifest struct {
	Kind string
	Data map[string]string
	Spec struct {
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		}
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     struct {
				HostPID        bool `yaml:"hostPID"`
				AutomountToken bool `yaml:"automountServiceAccountToken"`
				Containers     []struct {
					Args  []string
					Ports []struct {
						ContainerPort int `yaml:"containerPort"`
					}
					LivenessProbe   probe `yaml:"livenessProbe"`
					ReadinessProbe  probe `yaml:"readinessProbe"`
					Resources       struct{ Requests, Limits map[string]string }
					SecurityContext map[string]any `yaml:"securityContext"`
					VolumeMounts    []struct {
						Name      string
						MountPath string `yaml:"mountPath"`
					} `yaml:"volumeMounts"`
				}
				Volumes []struct{ Name string }
			}
		}
	}
}

type probe struct {
	HTTPGet struct{ Path, Port string } `yaml:"httpGet"`
}

// manifestsOf returns the objects of daemonset.yaml by kind.
func manifestsOf(t *testing.T) map[string]manifest {
	t.Helper()
	byKind := map[string]manifest{}
	dec := yaml.NewDecoder(bytes.NewReader(deployFile(t, "daemonset.yaml")))
	for {
		var m manifest
		err := dec.Decode(&m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		byKind[m.Kind] = m
	}
	return byKind
}

func TestDaemonSetFitsAgent(t *testing.T) {
	t.Parallel()
	byKind := manifestsOf(t)

	// /run may not be a memory file system where the test runs.
	data := []byte(byKind["ConfigMap"].Data["agent.yaml"])
	var problems config.Error
	if _, err := schema.Load("agent.yaml", data, nil, noEnv); err != nil && !errors.As(err, &problems) {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Path != "runtime_dir" {
			t.Error(p)
		}
	}
	unchecked := schema
	unchecked.Check = nil
	cfg, err := unchecked.Load("agent.yaml", data, nil, noEnv)
	if err != nil {
		t.Fatal(err)
	}

	spec := byKind["DaemonSet"].Spec
	for k, v := range spec.Selector.MatchLabels {
		if spec.Template.Metadata.Labels[k] != v {
			t.Errorf("the selector %s=%s does not match the pods", k, v)
		}
	}
	pod := spec.Template.Spec
	if !pod.HostPID || len(pod.Containers) != 1 {
		t.Fatalf("hostPID %v, %d containers", pod.HostPID, len(pod.Containers))
	}
	c := pod.Containers[0]
	_, port, err := net.SplitHostPort(cfg.MetricsAddress)
	if err != nil || len(c.Ports) != 1 || strconv.Itoa(c.Ports[0].ContainerPort) != port {
		t.Errorf("ports %v do not fit metrics.address %s", c.Ports, cfg.MetricsAddress)
	}
	if c.LivenessProbe.HTTPGet.Path != "/live" || c.ReadinessProbe.HTTPGet.Path != "/ready" {
		t.Errorf("probes %v and %v", c.LivenessProbe, c.ReadinessProbe)
	}
	if c.Resources.Requests["memory"] != "64Mi" || c.Resources.Limits["cpu"] != "125m" {
		t.Errorf("resources %v", c.Resources)
	}
	if c.SecurityContext["readOnlyRootFilesystem"] != true || c.SecurityContext["allowPrivilegeEscalation"] != false {
		t.Errorf("security context %v", c.SecurityContext)
	}

	// Every path in the configuration is in an existing volume, or where Kubernetes mounts
	// the service account's token.
	const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount/"
	needed := []string{cfg.TrustBundleFile, cfg.PSATTokenPath, cfg.KubeletToken, cfg.KubeletCAFile, cfg.DataDir, cfg.RuntimeDir, cfg.SocketPath, c.Args[2]}
	for _, path := range needed {
		mounted := pod.AutomountToken && strings.HasPrefix(path, serviceAccount)
		for _, m := range c.VolumeMounts {
			known := false
			for _, v := range pod.Volumes {
				known = known || v.Name == m.Name
			}
			if !known {
				t.Errorf("volume %s is mounted and not defined", m.Name)
			}
			mounted = mounted || path == m.MountPath || strings.HasPrefix(path, m.MountPath+"/")
		}
		if !mounted {
			t.Errorf("%s is in no volume", path)
		}
	}
}

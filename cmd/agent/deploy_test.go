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
)

func deployFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The unit sets variables that exist, and no restart after the exit codes that
// would only repeat.
func TestUnitFitsAgent(t *testing.T) {
	t.Parallel()
	unit := string(deployFile(t, "renewd-agent.service"))
	names := regexp.MustCompile(`(?m)^Environment=(\w+)=`).FindAllStringSubmatch(unit, -1)
	if len(names) == 0 {
		t.Error("no Environment= found")
	}
	for _, m := range names {
		if !slices.ContainsFunc(fields, func(f field) bool { return f.env() == m[1] }) {
			t.Errorf("%s is not a field's variable", m[1])
		}
	}
	if want := "RestartPreventExitStatus=" + strconv.Itoa(exitUsage) + " " + strconv.Itoa(exitBanned); !strings.Contains(unit, want+"\n") {
		t.Errorf("%s is missing", want)
	}
}

// manifest is what the tests look at in daemonset.yaml.
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
				HostPID    bool `yaml:"hostPID"`
				Containers []struct {
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

func TestDaemonSetFitsAgent(t *testing.T) {
	t.Parallel()
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

	// Where the test runs, /run need not be a memory file system.
	l := gather("agent.yaml", []byte(byKind["ConfigMap"].Data["agent.yaml"]), nil, noEnv)
	l.out = append(l.out, validate(l.cfg, l.origins, "agent.yaml")...)
	for _, p := range l.out {
		if p.path != "runtime_dir" {
			t.Error(p)
		}
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
	_, port, err := net.SplitHostPort(l.cfg.MetricsAddress)
	if err != nil || len(c.Ports) != 1 || strconv.Itoa(c.Ports[0].ContainerPort) != port {
		t.Errorf("ports %v do not fit metrics.address %s", c.Ports, l.cfg.MetricsAddress)
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

	// Everything that the configuration names lies in a volume that exists.
	needed := []string{l.cfg.TrustBundleFile, l.cfg.JoinTokenFile, l.cfg.DataDir, l.cfg.RuntimeDir, l.cfg.SocketPath, c.Args[2]}
	for _, path := range needed {
		mounted := false
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

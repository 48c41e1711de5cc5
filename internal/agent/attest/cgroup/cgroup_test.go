package cgroup_test

import (
	"os"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
)

const (
	uid     = "2c48913c-b29f-11e7-9350-020968147796"
	under   = "2c48913c_b29f_11e7_9350_020968147796"
	uid2    = "a2830d0d-b0f0-4ff0-81b5-0ee4e299cf80"
	under2  = "a2830d0d_b0f0_4ff0_81b5_0ee4e299cf80"
	static  = "0123456789abcdef0123456789abcdef"
	id      = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961"
	id2     = "b2a102854b4969b2ce98dc329c86b4fb2b06e4ad2cc8da9d8a7578c9cd2004a2"
	agentID = "7ca55bc836536f0d9d4bd1d5b0bd1dafe3a55a01d0d0bd8a35e9d2a1f0ee7aa1"
	nodeID  = "93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26"
)

// pod is the container id of the pod uid.
func pod(runtime string) cgroup.Container {
	return cgroup.Container{ID: id, Runtime: runtime, Pod: true, PodUID: uid}
}

// The forms of container runtimes and drivers, seen from the host, written after the
// sources of the versions that each names.
func TestForms(t *testing.T) {
	t.Parallel()
	none := cgroup.Container{}
	plain := func(runtime string) cgroup.Container { return cgroup.Container{ID: id, Runtime: runtime} }
	rootless := func(runtime string) cgroup.Container { return cgroup.Container{ID: id, Runtime: runtime, User: 1000} }
	ofService := cgroup.Container{ID: id, Runtime: "libpod", Path: "/system.slice/web.service/libpod-payload-" + id}
	staticPod := cgroup.Container{ID: id, Runtime: "cri-containerd", Pod: true, PodUID: static}
	for name, tt := range map[string]struct {
		source, path string
		want         cgroup.Container
	}{
		"containerd, systemd driver":                  {"kubelet 1.30, containerd 1.7", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"containerd, systemd driver, guaranteed":      {"kubelet 1.30, containerd 1.7", "/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"containerd, cgroupfs driver":                 {"kubelet 1.30, containerd 1.7", "/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"containerd, cgroupfs driver, guaranteed":     {"kubelet 1.30, containerd 1.7", "/kubepods/pod" + uid + "/" + id, pod("")},
		"containerd without the kubelet's driver, v1": {"kubelet 1.21, containerd 1.4, SystemdCgroup = false", "/system.slice/containerd.service/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id, pod("cri-containerd")},
		"containerd without the kubelet's driver":     {"kubelet 1.30, containerd 1.7, SystemdCgroup = false", "/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id, pod("cri-containerd")},
		"CRI-O, systemd driver":                       {"CRI-O 1.30", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/crio-" + id + ".scope", pod("crio")},
		"CRI-O, crun's subgroup":                      {"CRI-O 1.30, crun 1.14", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/crio-" + id + ".scope/container", pod("crio")},
		"CRI-O, cgroupfs driver":                      {"CRI-O 1.20", "/kubepods/burstable/pod" + uid + "/crio-" + id, pod("crio")},
		"CRI-O's conmon in the pod's slice":           {"CRI-O 1.30, conmon_cgroup = pod", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/crio-conmon-" + id + ".scope", none},
		"CRI-O's conmon in the system's slice":        {"CRI-O 1.30, conmon_cgroup = system.slice", "/system.slice/crio-conmon-" + id + ".scope", none},
		"Docker under the kubelet, systemd driver":    {"cri-dockerd 0.3", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/docker-" + id + ".scope", pod("docker")},
		"Docker under the kubelet, cgroupfs driver":   {"cri-dockerd 0.3", "/kubepods/burstable/pod" + uid + "/" + id, pod("")},
		"static pod":                           {"kubelet 1.37: a hash of the manifest", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + static + ".slice/cri-containerd-" + id + ".scope", staticPod},
		"static pod whose manifest has a UID":  {"kubelet 1.30: metadata.uid is kept", "/kubepods/burstable/podmine/" + id, cgroup.Container{ID: id, Pod: true}},
		"kubelet with a root":                  {"kind 0.20, containerd 1.7: --cgroup-root=/kubelet", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"kubelet with a root, cgroupfs driver": {"kind 0.11, containerd 1.5", "/kubelet/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"Docker, systemd driver":               {"Docker Engine 26", "/system.slice/docker-" + id + ".scope", plain("docker")},
		"Docker, cgroupfs driver":              {"Docker Engine 20.10", "/docker/" + id, plain("docker")},
		"Docker, another parent":               {"Amazon ECS", "/ecs/ff9e7bd7c0ab4ea99cdcf6c81d33e05c/" + id, plain("")},
		"Docker in a container":                {"docker:26-dind", "/docker/" + id + "/docker/" + id2, plain("docker")},
		"Docker, rootless":                     {"Docker Engine 26", "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-" + id + ".scope", rootless("docker")},
		"Podman":                               {"Podman 4.3", "/machine.slice/libpod-" + id + ".scope/container", plain("libpod")},
		"Podman's conmon":                      {"Podman 4.3", "/machine.slice/libpod-conmon-" + id + ".scope", none},
		"Podman, pod":                          {"Podman 4.3", "/machine.slice/machine-libpod_pod_" + id2 + ".slice/libpod-" + id + ".scope/container", plain("libpod")},
		"Podman, cgroupfs driver":              {"Podman 4.3, --cgroup-manager=cgroupfs", "/libpod_parent/libpod-" + id, plain("libpod")},
		"Podman, cgroupfs driver, pod":         {"Podman 4.3, --cgroup-manager=cgroupfs", "/libpod_parent/" + id2 + "/libpod-" + id, plain("libpod")},
		"Podman in a service":                  {"Podman 4.4, Quadlet: --cgroups=split", "/system.slice/web.service/libpod-payload-" + id, ofService},
		"Podman in a service, a subgroup":      {"Podman 4.4, Quadlet: --cgroups=split, systemd in the container", "/system.slice/web.service/libpod-payload-" + id + "/system.slice/x.service", ofService},
		"Podman, rootless":                     {"Podman 4.3", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope/container", rootless("libpod")},
		"Podman in a user's service":           {"Podman 4.4, Quadlet: --cgroups=split", "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service/libpod-payload-" + id, rootless("libpod")},
		"nerdctl":                              {"nerdctl 1.7", "/system.slice/nerdctl-" + id + ".scope", plain("nerdctl")},
		"kernel thread":                        {"Linux", "/", none},
		"service":                              {"systemd 252", "/system.slice/ssh.service", none},
		"session":                              {"systemd 252", "/user.slice/user-1000.slice/session-1.scope", none},
		"Podman's health check":                {"Podman 4.3: a transient unit of the host", "/system.slice/" + id + "-1b2c3d4e5f.service", none},
		"containerd's shim":                    {"containerd 1.7", "/system.slice/containerd.service", none},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := cgroup.View{}.Parse([]byte("0::" + tt.path + "\n"))
			if err != nil || got != tt.want {
				t.Errorf("%s (%s): got %+v, %v, want %+v", tt.path, tt.source, got, err, tt.want)
			}
		})
	}
}

// What a process may create below its own control group does not count.
func TestForgedPaths(t *testing.T) {
	t.Parallel()
	forged := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under2 + ".slice/cri-containerd-" + id2 + ".scope"
	for name, tt := range map[string]struct {
		path string
		want cgroup.Container
	}{
		"in a pod":                        {"/kubepods/besteffort/pod" + uid + "/" + id + forged, pod("")},
		"in a pod, cgroupfs names":        {"/kubepods/besteffort/pod" + uid + "/" + id + "/kubepods/pod" + uid2 + "/" + id2, pod("")},
		"in a pod, container alone":       {"/kubepods/besteffort/pod" + uid + "/" + id + "/" + id2, pod("")},
		"in a pod next to the agent":      {"/../cri-containerd-" + id + ".scope" + forged, cgroup.Container{ID: id, Runtime: "cri-containerd", Pod: true}},
		"in a pod, seen from the agent":   {"/../../pod" + uid + "/" + id + forged, pod("")},
		"in a pod, a runtime's own group": {"/kubepods/besteffort/pod" + uid + "/crio-conmon-" + id + forged, cgroup.Container{}},
		"in a container":                  {"/system.slice/docker-" + id + ".scope" + forged, cgroup.Container{ID: id, Runtime: "docker"}},
		"in a container without parent":   {"/" + id + forged, cgroup.Container{ID: id}},
		"in a service":                    {"/system.slice/web.service" + forged, cgroup.Container{}},
		"in a service, containerd's form": {"/system.slice/web.service/kubepods-besteffort-pod" + under2 + ".slice:cri-containerd:" + id2, cgroup.Container{}},
		"in a service, Docker's form":     {"/system.slice/web.service/docker-" + id2 + ".scope", cgroup.Container{}},
		"in a runtime's service":          {"/system.slice/containerd.service/kubepods/pod" + uid2 + "/" + id2, cgroup.Container{}},
		"in a session":                    {"/user.slice/user-1000.slice/session-1.scope" + forged, cgroup.Container{}},
		"in a user's instance":            {"/user.slice/user-1000.slice/user@1000.service" + forged, cgroup.Container{ID: id2, Runtime: "cri-containerd", User: 1000}},
		"in a user's service":             {"/user.slice/user-1000.slice/user@1000.service/app.slice/containerd.service/kubepods-pod" + under2 + ".slice:cri-containerd:" + id2, cgroup.Container{ID: id2, Runtime: "cri-containerd", User: 1000}},
		"in a virtual machine":            {"/machine.slice/machine-web.scope" + forged, cgroup.Container{}},
		"in LXC":                          {"/lxc.payload.web" + forged, cgroup.Container{}},
		"in LXC, v1":                      {"/lxc/web" + forged, cgroup.Container{}},
		"in a user's group":               {"/user/web/0" + forged, cgroup.Container{}},
		"below an unknown parent":         {"/garden" + forged, cgroup.Container{ID: id2, Runtime: "cri-containerd"}},
		"with a UID that is no pod's":     {"/kubepods-" + under2 + ".slice:cri-containerd:" + id2, cgroup.Container{ID: id2, Runtime: "cri-containerd", Pod: true}},
		"with another form of the pod":    {"/kubepods/notpod" + uid2 + "/" + id2, cgroup.Container{ID: id2}},
		"in a pod of unknown form":        {"/kubepods/podmine/web/" + id2, cgroup.Container{}},
		"in a directory named like one":   {"/podman/" + id2, cgroup.Container{ID: id2}},
		"removed":                         {"/kubepods/pod" + uid + "/" + id + " (deleted)", cgroup.Container{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := cgroup.View{}.Parse([]byte("0::" + tt.path + "\n"))
			if err != nil || got != tt.want {
				t.Errorf("%s: got %+v, %v, want %+v", tt.path, got, err, tt.want)
			}
		})
	}
}

// Where the agent is itself, others can be, too: in a pod, in a node that is a
// container, in a user's instance.
func TestViews(t *testing.T) {
	t.Parallel()
	kind := "/docker/" + nodeID
	for name, tt := range map[string]struct {
		own, path string
		want      cgroup.Container
	}{
		"from a pod, same class":                 {"/", "/../../kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"from a pod, another class":              {"/", "/../../../kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"from a pod, guaranteed":                 {"/", "/../../../kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"from a pod, cgroupfs driver":            {"/", "/../../../burstable/pod" + uid + "/" + id, pod("")},
		"from a pod, containerd's other form":    {"/", "/../kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id, pod("cri-containerd")},
		"from a pod, the pod's other container":  {"/", "/../cri-containerd-" + id + ".scope", cgroup.Container{ID: id, Runtime: "cri-containerd", Pod: true}},
		"from a pod, cgroupfs, other container":  {"/", "/../" + id, cgroup.Container{ID: id, Pod: true}},
		"from a pod, crun's subgroup":            {"/", "/../../crio-" + id + ".scope/container", cgroup.Container{ID: id, Runtime: "crio", Pod: true}},
		"from a pod, the agent's own container":  {"/", "/", cgroup.Container{}},
		"from a pod, a process of the node":      {"/", "/../../../../system.slice/ssh.service", cgroup.Container{}},
		"from a pod, a container beside it":      {"/", "/../../../../docker/" + id, cgroup.Container{ID: id, Runtime: "docker"}},
		"from a moved agent":                     {"/init", "/../../pod" + uid + "/" + id, pod("")},
		"v1, another pod":                        {"/kubepods/besteffort/pod" + uid2 + "/" + agentID, "/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"v1, the pod's other container":          {"/kubepods/besteffort/pod" + uid + "/" + agentID, "/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"v1, the agent's own container":          {"/kubepods/besteffort/pod" + uid + "/" + id, "/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"v1, below the agent's own":              {"/kubepods/besteffort/pod" + uid + "/" + id, "/kubepods/besteffort/pod" + uid + "/" + id + "/web.service/x", pod("")},
		"v1, a root of one's own":                {"/prod/kubepods/besteffort/pod" + uid2 + "/" + agentID, "/prod/kubepods/burstable/pod" + uid + "/" + id, pod("")},
		"v1, kind":                               {kind + "/kubepods/besteffort/pod" + uid2 + "/" + agentID, kind + "/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"v1, kind, agent a service of the node":  {kind + "/system.slice/renewd.service", kind + "/kubelet/kubepods/besteffort/pod" + uid + "/" + id, pod("")},
		"v1, kind, a service of the node":        {kind + "/system.slice/renewd.service", kind + "/system.slice/ssh.service", cgroup.Container{ID: nodeID, Runtime: "docker"}},
		"v1, kind, another container of Docker":  {kind + "/system.slice/renewd.service", "/docker/" + id + "/kubepods/pod" + uid2 + "/" + id2, cgroup.Container{ID: id, Runtime: "docker"}},
		"v1, kind, from the host":                {"/system.slice/renewd.service", kind + "/kubepods/besteffort/pod" + uid + "/" + id, cgroup.Container{ID: nodeID, Runtime: "docker"}},
		"kind on a systemd host":                 {"/system.slice/docker-" + nodeID + ".scope/system.slice/renewd.service", "/system.slice/docker-" + nodeID + ".scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod("cri-containerd")},
		"a cluster in a pod":                     {"/kubepods/pod" + uid2 + "/" + nodeID + "/kubepods/pod" + uid2 + "/" + agentID, "/kubepods/pod" + uid2 + "/" + nodeID + "/kubepods/pod" + uid + "/" + id, pod("")},
		"a cluster in a pod, without a pod":      {"/kubepods/pod" + uid2 + "/" + nodeID + "/init", "/kubepods/pod" + uid2 + "/" + nodeID + "/docker/" + id, cgroup.Container{ID: id, Runtime: "docker"}},
		"a user's own agent":                     {"/user.slice/user-1000.slice/user@1000.service/app.slice/renewd.service", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope/container", cgroup.Container{ID: id, Runtime: "libpod", User: 1000}},
		"rootless Kubernetes, same user's agent": {"/user.slice/user-1000.slice/user@1000.service/k3s.service/renewd", "/user.slice/user-1000.slice/user@1000.service/k3s.service/kubepods/besteffort/pod" + uid + "/" + id, cgroup.Container{ID: id, Pod: true, PodUID: uid, User: 1000}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			view, err := cgroup.NewView([]byte("0::" + tt.own + "\n"))
			if err != nil {
				t.Fatal(err)
			}
			got, err := view.Parse([]byte("0::" + tt.path + "\n"))
			if err != nil || got != tt.want {
				t.Errorf("%s from %s: got %+v, %v, want %+v", tt.path, tt.own, got, err, tt.want)
			}
		})
	}
}

// cgroup v1 has a path for each hierarchy.
func TestHierarchies(t *testing.T) {
	t.Parallel()
	docker := cgroup.Container{ID: id, Runtime: "docker"}
	kubepods := "/kubepods/besteffort/pod" + uid + "/" + id
	for name, tt := range map[string]struct {
		file string
		want cgroup.Container
		err  string
	}{
		"all the same":              {"2:cpu,cpuacct:" + kubepods + "\n1:name=systemd:" + kubepods + "\n", pod(""), ""},
		"one at the root":           {"2:cpu,cpuacct:/\n1:name=systemd:" + kubepods + "\n", pod(""), ""},
		"hybrid":                    {"1:name=systemd:" + kubepods + "\n0::/system.slice/containerd.service\n", pod(""), ""},
		"one without the pod":       {"2:cpu:/" + id + "\n1:name=systemd:" + kubepods + "\n0::/" + id, pod(""), ""},
		"two containers":            {"2:cpu:/docker/" + id2 + "\n1:name=systemd:/docker/" + id + "\n", cgroup.Container{}, "two containers"},
		"two pods":                  {"2:cpu:/kubepods/pod" + uid2 + "/" + id + "\n1:name=systemd:" + kubepods + "\n", cgroup.Container{}, "two pods"},
		"no line break at the end":  {"0::/docker/" + id, docker, ""},
		"a colon in the path":       {"0::/docker/" + id + "/a:b", docker, ""},
		"empty":                     {"", cgroup.Container{}, ""},
		"no path":                   {"0:\n", cgroup.Container{}, "not ID:CONTROLLERS:/PATH"},
		"a relative path":           {"0::docker/" + id, cgroup.Container{}, "not ID:CONTROLLERS:/PATH"},
		"an empty line":             {"0::/\n\n", cgroup.Container{}, "not ID:CONTROLLERS:/PATH"},
		"longer than any real file": {strings.Repeat("0::/a\n", 20_000), cgroup.Container{}, "more than 65536 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := cgroup.View{}.Parse([]byte(tt.file))
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %+v, %v, want %+v, %q", got, err, tt.want, tt.err)
			}
		})
	}
}

// The test process is in the container that it is in, or in none: reading works.
func TestRead(t *testing.T) {
	t.Parallel()
	view, err := cgroup.Self()
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := view.Read(p); err != nil {
		t.Error(err)
	}
}

// Whatever the file holds, what is found has the form of an ID and is in the file.
func FuzzParse(f *testing.F) {
	f.Add([]byte("0::/\n"), []byte("0::/../../kubepods-besteffort-pod"+under+".slice/cri-containerd-"+id+".scope\n"))
	f.Add([]byte("1:cpu:/docker/"+nodeID+"/init\n"), []byte("1:cpu:/docker/"+nodeID+"/kubepods/pod"+uid+"/"+id+"\n0::/\n"))
	f.Add([]byte(""), []byte("0::/system.slice/containerd.service/kubepods-pod"+under+".slice:cri-containerd:"+id))
	f.Add([]byte(""), []byte("0::/kubepods-"+under+".slice:cri-containerd:"+id))
	f.Add([]byte(""), []byte("0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-"+id+".scope/container"))
	f.Fuzz(func(t *testing.T, own, file []byte) {
		view, err := cgroup.NewView(own)
		if err != nil {
			view = cgroup.View{}
		}
		c, err := view.Parse(file)
		text := strings.ReplaceAll(string(file), "_", "-")
		switch {
		case err != nil && c != (cgroup.Container{}):
			t.Errorf("an error with a result: %+v, %v", c, err)
		case c.ID == "" && c != (cgroup.Container{}):
			t.Errorf("no container: %+v", c)
		case c.ID != "" && (len(c.ID) != 64 || !strings.Contains(text, c.ID)):
			t.Errorf("ID %q is not in the file", c.ID)
		case c.PodUID != "" && (!c.Pod || !strings.Contains(text, "pod"+c.PodUID)):
			t.Errorf("pod %+v is not in the file", c)
		}
	})
}

package cgroup

import (
	"slices"
	"strconv"
	"strings"
)

// find walks a path from the root down to the outermost container that the agent is
// not in itself. If there is none, the process is in the innermost of those that the
// agent is in, too.
func find(path, own []string) Container {
	shared := 0
	for shared < len(path) && shared < len(own) && path[shared] == own[shared] {
		shared++
	}
	w := walk{trusted: true}
	var innermost Container
	for i := range path {
		if i < shared {
			w.shared(parent(path, i), path[i])
			if w.found.ID != "" {
				innermost, w = w.found, walk{trusted: true, user: w.user}
			}
			continue
		}
		w.next(parent(path, i), path[i])
		switch {
		case w.found.ID != "" && w.ofService:
			w.found.Path = "/" + strings.Join(path[:i+1], "/")
			return w.found
		case w.found.ID != "":
			return w.found
		case w.ended:
			return innermost
		}
	}
	return innermost
}

func parent(path []string, i int) string {
	if i == 0 {
		return ""
	}
	return path[i-1]
}

// walk is what is known about the control groups from the root, or from the container
// that is the agent's node, down to the current one.
type walk struct {
	// trusted is true while only root and the kubelet can have given the names.
	trusted bool
	// kubepods is true below the kubelet's control group, pod in that of a pod.
	kubepods, pod bool
	podUID        string
	// up counts the leading "..", which lead up from the agent's namespace.
	up int
	// service is the unit that the last segment named.
	service string
	user    uint32

	found Container
	// ofService is true if a service may have made the control group of found.
	ofService bool
	// ended is true below a control group that somebody else governs.
	ended bool
}

// shared takes a step down that the agent's own path takes, too: it ends at nothing,
// because the agent is where it leads.
func (w *walk) shared(parent, segment string) {
	w.next(parent, segment)
	w.ended, w.trusted, w.service = false, true, ""
}

// next takes a step down.
func (w *walk) next(parent, segment string) {
	service := w.service
	w.service = ""
	uid, isPod := podOf(segment)
	runtime, id, ofPod := containerOf(parent, segment)
	user, isUser := userOf(segment)
	switch {
	case segment == "..":
		w.up++
	case id != "":
		// Below a service's own control group: containers of Podman's "split" mode, and
		// those whose runtime took the systemd driver's name for a path.
		if service != "" && runtime != payload && (ofPod == "" || !slices.Contains(runtimeServices, service)) {
			w.ended = true
			return
		}
		w.ofService = runtime == payload && service != "" && w.user == 0
		if ofPod != "" && w.trusted {
			w.kubepods, w.podUID = true, ofPod
		}
		w.find(runtime, id, w.up == 1 && parent == "..")
	case service != "", w.pod:
		w.ended = true
	case isPod && w.trusted && (uid != "" || w.kubepods):
		w.kubepods, w.pod, w.podUID = true, true, uid
	case strings.HasSuffix(segment, ".slice"):
		// Only the system's systemd makes slices outside of a user's instance.
		w.kubepods = w.kubepods || isKubepods(strings.TrimSuffix(segment, ".slice"))
	case isKubepods(segment), segment == "kubelet":
		w.kubepods = w.kubepods || segment != "kubelet"
	case isUser:
		w.user, w.trusted = user, false
	case strings.HasSuffix(segment, ".service"):
		w.service = segment
	case isDelegated(segment):
		w.ended = true
	default:
		// A parent that Docker or Podman is configured with, such as /ecs/TASK.
		w.trusted = false
	}
}

// find ends the walk at a container. What is right next to the agent's container is in
// the same pod, if that is in one.
func (w *walk) find(runtime, id string, isSibling bool) {
	c := Container{ID: id, Runtime: runtime, User: w.user}
	if runtime == payload {
		c.Runtime = "libpod"
	}
	if w.trusted {
		c.Pod = w.kubepods || isSibling || runtime == "cri-containerd" || runtime == "crio"
		c.PodUID = w.podUID
	}
	w.found = c
}

// payload is the prefix of Podman's containers with --cgroups=split, which live in the
// control group of the service that started them.
const payload = "libpod-payload"

// prefixes are what container runtimes put before the ID. The control groups of
// runtimes' own processes have others: crio-conmon, libpod-conmon.
var prefixes = []string{"docker", "libpod", payload, "cri-containerd", "crio", "nerdctl"}

// runtimeServices are the services of container runtimes and of Kubernetes
// distributions with one built in, which all run as root. If the kubelet uses the systemd
// driver and containerd does not, containers are below them.
var runtimeServices = []string{"containerd.service", "k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service",
	"k0scontroller.service", "k0sworker.service", "snap.microk8s.daemon-containerd.service"}

// containerOf returns the container that a control group's name names, if any:
//
//	ID                                     cgroupfs driver of Docker, containerd
//	PREFIX-ID                              cgroupfs driver of CRI-O, Podman
//	PREFIX-ID.scope                        systemd driver
//	kubepods-podUID.slice:PREFIX:ID        a systemd driver's name under the cgroupfs driver
func containerOf(parent, segment string) (runtime, id, podUID string) {
	if slice, rest, ok := strings.Cut(segment, ":"); ok {
		prefix, id, _ := strings.Cut(rest, ":")
		uid, _ := podOf(slice)
		if strings.HasSuffix(slice, ".slice") && slices.Contains(prefixes, prefix) && isID(id) {
			return prefix, id, uid
		}
		return "", "", ""
	}
	if isID(segment) {
		switch parent {
		case "libpod_parent": // a pod of Podman
			return "", "", ""
		case "docker", "libpod":
			runtime = parent
		}
		return runtime, segment, ""
	}
	name := strings.TrimSuffix(segment, ".scope")
	if at := strings.LastIndexByte(name, '-'); at > 0 && slices.Contains(prefixes, name[:at]) && isID(name[at+1:]) {
		return name[:at], name[at+1:], ""
	}
	return "", "", ""
}

// podOf reports whether a control group's name is a pod's, and its UID: podUID
// (cgroupfs driver), or kubepods-QOS-podUID.slice with underscores for dashes (systemd
// driver). The UID is empty if it is of another form, as the manifest of a static pod
// may have it.
func podOf(segment string) (uid string, ok bool) {
	if name, isSlice := strings.CutSuffix(segment, ".slice"); isSlice {
		at := strings.LastIndexByte(name, '-')
		if at < 0 || !isKubepods(name[:at]) {
			return "", false
		}
		segment = name[at+1:]
	}
	if uid, ok = strings.CutPrefix(segment, "pod"); !ok {
		return "", false
	}
	if uid = strings.ReplaceAll(uid, "_", "-"); !isUID(uid) {
		uid = ""
	}
	return uid, ok
}

// isKubepods recognizes the kubelet's control groups above the pods: kubepods,
// below a root (kubelet-kubepods) and by quality of service.
func isKubepods(name string) bool {
	if name == "burstable" || name == "besteffort" {
		return true
	}
	name = strings.TrimSuffix(strings.TrimSuffix(name, "-burstable"), "-besteffort")
	return name == "kubepods" || strings.HasSuffix(name, "-kubepods")
}

// userOf returns the user of a systemd instance: user@1000.service.
func userOf(segment string) (uint32, bool) {
	name, isService := strings.CutSuffix(segment, ".service")
	name, isUser := strings.CutPrefix(name, "user@")
	uid, err := strconv.ParseUint(name, 10, 32)
	return uint32(uid), isService && isUser && err == nil
}

// isDelegated reports whether somebody else than root may give names below a control
// group that is no service: sessions and virtual machines, LXC's containers, and the
// groups that pam_cgfs gives to a user.
func isDelegated(segment string) bool {
	return strings.HasSuffix(segment, ".scope") || strings.HasPrefix(segment, "lxc") || strings.HasSuffix(segment, ".lxc") || segment == "user"
}

// isID reports whether s is a container's ID: 64 hexadecimal digits.
func isID(s string) bool { return len(s) == 64 && isHex(s) }

// isUID reports whether s is a pod's UID: a UUID, or the 32 digits that the kubelet
// gives to a static pod.
func isUID(s string) bool {
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		s = s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	}
	return len(s) == 32 && isHex(s)
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

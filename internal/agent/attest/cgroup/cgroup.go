// Package cgroup finds the container of a process in /proc/PID/cgroup, which the
// kernel writes.
//
// A process that may create control groups below its own can give them any name, such
// as that of another pod's container. So a path is read from the node's root
// downwards, the outermost container counts, and nothing is read below a control group
// that was handed over to somebody else: to a service, a session, a user, a virtual
// machine. (SPIRE's locator, 1.15.3, reads upwards from the end.)
//
// The exception is a container that the agent itself is in: it is the agent's node, as
// in kind, where a whole node is one Docker container. [View] is therefore the agent's
// own place in the hierarchy. An agent in a control group namespace of its own sees paths
// relative to it (/../../podX/Y): the common part is not in them.
//
// The mounts of a process are not looked at: they are the process's own, and can show
// another container's control group.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/renewd/renewd/internal/agent/attest"
)

// Container is the container of a process. The zero value means: none.
type Container struct {
	// ID is the runtime's ID of the container: 64 hexadecimal digits.
	ID string
	// Runtime is what the runtime puts before the ID: "docker", "libpod" (Podman),
	// "cri-containerd", "crio". It is empty if there is nothing, as with containerd
	// under the cgroupfs driver.
	Runtime string
	// Pod reports whether the kubelet may have started the container. It is false if the
	// path shows another origin, such as /system.slice/docker-ID.scope.
	Pod bool
	// PodUID is the UID of the pod as the kubelet has it, with dashes, or without any
	// for a static pod. It is empty if the path does not show it, as for a container
	// next to the agent's in one pod.
	PodUID string
	// User is the user in whose systemd instance the container runs ("rootless"), 0 for
	// the system's. That user can give the control group of any of its processes any
	// name: ask nobody but an engine of this user about the ID.
	User uint32
	// Path is set for a container below a service that is not the runtime's own (Podman's
	// --cgroups=split): the path of its control group. A service with Delegate= and a User=
	// can give a control group of its own that name, so the ID counts only if the engine's
	// container is at the same path.
	Path string
}

// limit bounds the file: 14 hierarchies of cgroup v1 with paths of 4 KiB each.
const limit = 64 << 10

// View is the place from which paths are seen: the agent's own control groups.
// The zero value is at the root of each hierarchy. A View is safe for concurrent use.
type View struct {
	own map[string][]string // by hierarchy: the segments of the agent's path
}

// Self returns the view of this process.
func Self() (View, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return View{}, fmt.Errorf("read the agent's own control groups: %w", err)
	}
	return NewView(b)
}

// NewView returns the view of an agent whose /proc/self/cgroup is b.
func NewView(b []byte) (View, error) {
	v := View{own: make(map[string][]string)}
	err := eachLine(b, func(hierarchy string, path []string) error {
		v.own[hierarchy] = path
		return nil
	})
	return v, err
}

// Read returns the container of a process. It is the caller's only if
// [attest.Peer.Alive] returns nil afterwards. A process does not leave its container: that
// takes write access to a control group above both, so one reading is enough. In cgroup
// v1 the kernel shows a process without a main thread in no container.
func (v View) Read(p *attest.Peer) (Container, error) {
	b, err := p.ReadProc("cgroup", nil, limit)
	if err != nil {
		return Container{}, fmt.Errorf("read control groups: %w", err)
	}
	c, err := v.Parse(b)
	if err != nil {
		return Container{}, fmt.Errorf("read control groups: %s: %w", p.Proc("cgroup"), err)
	}
	return c, nil
}

// Parse returns the container in the content of a /proc/PID/cgroup file as the agent
// reads it. In cgroup v1, hierarchies that show no container are ignored; it is an
// error if two show different ones.
func (v View) Parse(b []byte) (Container, error) {
	var found Container
	err := eachLine(b, func(hierarchy string, path []string) error {
		c := find(path, v.own[hierarchy])
		switch {
		case c.ID == "":
		case found.ID == "" || c.ID == found.ID && found.PodUID == "":
			found = c
		case c.ID != found.ID:
			return fmt.Errorf("the hierarchies show two containers, %s and %s", found.ID, c.ID)
		case c.PodUID != "" && c.PodUID != found.PodUID:
			return fmt.Errorf("the hierarchies show two pods of container %s: %s and %s", c.ID, found.PodUID, c.PodUID)
		}
		return nil
	})
	if err != nil {
		return Container{}, err
	}
	return found, nil
}

// eachLine calls do for each line: "ID:CONTROLLERS:PATH", cgroups(7). The path may
// contain colons, but no line break: the kernel refuses those in names.
func eachLine(b []byte, do func(hierarchy string, path []string) error) error {
	if len(b) > limit {
		return fmt.Errorf("more than %d bytes", limit)
	}
	for line := range bytes.Lines(b) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		id, rest, ok := strings.Cut(string(line), ":")
		controllers, path, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 || !strings.HasPrefix(path, "/") {
			return errors.New("a line is not ID:CONTROLLERS:/PATH")
		}
		var segments []string
		if path != "/" {
			segments = strings.Split(path[1:], "/")
		}
		if err := do(id+":"+controllers, segments); err != nil {
			return err
		}
	}
	return nil
}

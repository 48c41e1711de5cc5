// Package docker attests a process by the container that it runs in, as Docker Engine or
// Podman describes it. Its selectors are those of SPIRE's attestor of the same name:
//
//	docker:label:com.example.name:foo     each label of the container
//	docker:env:KEY=VALUE                  each variable of its configuration
//	docker:image_id:registry/app:1        the image's name, as it was given
//	docker:image_config_digest:sha256:... the ID of the image that it was created from
//
// SPIRE (1.15.3) resolves the name again for the last one. So it gives an old container
// the digest of a newer image when that has been pulled under the name; this package gives
// the one that runs.
//
// Whoever can create containers chooses labels and variables freely. On Docker Engine and
// rootful Podman that is root. A rootless Podman belongs to its user, who can have it say
// anything: then only an entry that also names the user (unix:uid) means something.
package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
)

// Name is the attestor's name and the type of its selectors.
const Name = "docker"

// Config configures the attestor. Paths are those of Unix sockets.
type Config struct {
	// Socket is that of Docker Engine, Podman that of Podman as root.
	Socket, Podman string
	// RootlessPodman is that of a user's Podman, with %d for the user ID: see
	// [CheckTemplate]. Empty: containers of rootless Podman get no selectors.
	RootlessPodman string
	// Container finds the container of a process: the Read of a [cgroup.View].
	Container func(*attest.Peer) (cgroup.Container, error)
}

// Attestor is an [attest.Attestor]. Make it with [New].
type Attestor struct {
	cfg            Config
	docker, podman *engine

	mu     sync.Mutex
	asking map[uint32]int // calls in flight to a user's Podman, by user ID
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns the attestor. It connects when it is needed.
func New(cfg Config) *Attestor {
	return &Attestor{cfg: cfg, docker: newEngine(cfg.Socket), podman: newEngine(cfg.Podman), asking: make(map[uint32]int)}
}

// maxReason bounds what of an engine's error is quoted: a user can have Podman say anything.
const maxReason = 500

// maxPerUser is how many calls to one user's Podman may be in flight. The user decides how
// long it takes and how much it answers. [attest.Limit] bounds the calls of all containers
// together: without a bound for each user, one could have the callers of all others fail.
const maxPerUser = 4

// enter reports whether a user's Podman may be asked, until leave is called.
func (a *Attestor) enter(uid uint32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.asking[uid] >= maxPerUser {
		return false
	}
	a.asking[uid]++
	return true
}

func (a *Attestor) leave(uid uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.asking[uid]--; a.asking[uid] == 0 {
		delete(a.asking, uid)
	}
}

// Name returns "docker".
func (a *Attestor) Name() string { return Name }

// Attest asks the engine of the process's container about it. There are no selectors if the
// process is in none, or in one of another runtime.
func (a *Attestor) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	c, err := a.cfg.Container(p)
	if err != nil {
		return nil, err
	}
	e := a.docker
	switch {
	case c.ID == "":
		return nil, nil
	case c.User != 0: // the user gives the names of these control groups
		if c.Runtime != "libpod" || a.cfg.RootlessPodman == "" {
			return nil, nil
		}
		if !a.enter(c.User) {
			return nil, fmt.Errorf("%d earlier calls to the Podman of user %d have not ended", maxPerUser, c.User)
		}
		defer a.leave(c.User)
		e = newUserEngine(expand(a.cfg.RootlessPodman, c.User), c.User)
	case c.Runtime == "libpod":
		e = a.podman
	case c.Runtime != "docker" && c.Runtime != "":
		return nil, nil
	}
	found, err := e.inspect(ctx, c.ID)
	switch {
	case err == nil:
		if err := a.checkPath(c, found); err != nil {
			return nil, fmt.Errorf("process %d: %w", p.PID(), err)
		}
		return selectors(found), nil
	case errdefs.IsNotFound(err) && c.Runtime == "":
		// The path does not tell the runtime, and it is not this engine.
		return nil, nil
	case errdefs.IsNotFound(err):
		// It was removed, and its process lives on for a moment, or another engine of
		// this kind runs it. What an entry could need is not known.
		return nil, fmt.Errorf("%s does not know container %s of process %d", e.path, c.ID, p.PID())
	}
	return nil, fmt.Errorf("inspect container %s: %.*s", c.ID, maxReason, err.Error())
}

// checkPath returns an error if the control group has the name of a container and may not be
// its: the container's first process is elsewhere.
func (a *Attestor) checkPath(c cgroup.Container, found container.InspectResponse) error {
	if c.Path == "" {
		return nil
	}
	if found.State == nil || found.State.Pid <= 0 {
		return fmt.Errorf("container %s does not run", c.ID)
	}
	first, err := attest.FromPID(found.State.Pid, 0, 0)
	if err != nil {
		return fmt.Errorf("first process of container %s: %w", c.ID, err)
	}
	defer first.Close()
	is, err := a.cfg.Container(first)
	if err == nil {
		err = first.Alive()
	}
	switch {
	case err != nil:
		return fmt.Errorf("first process of container %s: %w", c.ID, err)
	case is != c:
		return fmt.Errorf("its control group %s has the name of container %s, which is in another one", c.Path, c.ID)
	}
	return nil
}

// selectors returns the selectors of a container.
func selectors(c container.InspectResponse) []cache.Selector {
	var out []cache.Selector
	add := func(value string) { out = append(out, cache.Selector{Type: Name, Value: value}) }
	for _, label := range slices.Sorted(maps.Keys(c.Config.Labels)) {
		add("label:" + label + ":" + c.Config.Labels[label])
	}
	for _, variable := range c.Config.Env {
		add("env:" + variable)
	}
	if c.Config.Image != "" {
		add("image_id:" + c.Config.Image)
	}
	if c.Image != "" {
		add("image_config_digest:" + c.Image)
	}
	return out
}

// CheckTemplate returns an error unless a path has %d once, for a user ID, and %% for each
// other percent sign, as in SPIRE's podman_socket_path_template.
func CheckTemplate(path string) error {
	rest := strings.ReplaceAll(path, "%%", "")
	if strings.Count(rest, "%d") != 1 || strings.Count(rest, "%") != 1 {
		return errors.New("does not have %d once, the place of the user ID")
	}
	return nil
}

func expand(template string, uid uint32) string { return fmt.Sprintf(template, uid) }

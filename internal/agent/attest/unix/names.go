package unix

import (
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	// namesTTL is how long a name is cached. The user database may be a remote
	// directory server, and every call of a workload needs names.
	namesTTL = 30 * time.Second
	// maxNames bounds the cached names: users with ranges of subordinate IDs may
	// connect with many IDs.
	maxNames = 4096
)

// names turns user or group IDs into selectors: one of the ID, and one of its name if
// it has one. It is safe for concurrent use.
type names struct {
	idPrefix, namePrefix string
	lookup               func(id string) (string, error) // "" if there is no name

	mu       sync.RWMutex
	cached   map[uint32]cachedName
	inFlight singleflight.Group
}

// cachedName has the selectors of one ID.
type cachedName struct {
	id, name  string // values of selectors; name is empty if there is none
	expiresAt time.Time
}

func newNames(idPrefix, namePrefix string, lookup func(string) (string, error)) *names {
	return &names{idPrefix: idPrefix, namePrefix: namePrefix, lookup: lookup, cached: make(map[uint32]cachedName)}
}

// add adds the selectors of an ID. If the user database fails, it uses an expired name.
// Without one it adds a failure, because an entry may need the name.
func (n *names) add(f *findings, id uint32) {
	n.mu.RLock()
	name, ok := n.cached[id]
	n.mu.RUnlock()
	if !ok || !time.Now().Before(name.expiresAt) {
		fetched, err := n.fetch(id)
		switch {
		case err == nil:
			name = fetched
		case !ok:
			name.id = n.idPrefix + formatID(id)
			f.addFailure(fmt.Errorf("name of %s: %w", name.id, err))
		}
	}
	f.add(name.id)
	if name.name != "" {
		f.add(name.name)
	}
}

func (n *names) fetch(id uint32) (cachedName, error) {
	text := formatID(id)
	v, err, _ := n.inFlight.Do(text, func() (any, error) {
		name, err := n.lookup(text)
		if err != nil {
			return cachedName{}, err
		}
		fetched := cachedName{id: n.idPrefix + text, expiresAt: time.Now().Add(namesTTL)}
		if name != "" {
			fetched.name = n.namePrefix + name
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.cached) >= maxNames {
			clear(n.cached)
		}
		n.cached[id] = fetched
		return fetched, nil
	})
	return v.(cachedName), err
}

func lookupUser(id string) (string, error) {
	u, err := user.LookupId(id)
	if err != nil {
		return "", ignoreUnknownID(err)
	}
	return u.Username, nil
}

func lookupGroup(id string) (string, error) {
	g, err := user.LookupGroupId(id)
	if err != nil {
		return "", ignoreUnknownID(err)
	}
	return g.Name, nil
}

// ignoreUnknownID returns nil if err says that the ID has no name. A container image
// with only the agent has no /etc/passwd and thus no names.
func ignoreUnknownID(err error) error {
	var noUser user.UnknownUserIdError
	var noGroup user.UnknownGroupIdError
	if errors.As(err, &noUser) || errors.As(err, &noGroup) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

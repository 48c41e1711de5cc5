package unix

import (
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/renewd/renewd/cache"
)

const (
	// namesTTL is how long a name is believed. The user database may be a
	// directory server far away, and is asked for each call of a workload.
	namesTTL = 30 * time.Second
	// maxNames bounds the names kept. Any number of IDs may come by where
	// users have ranges of subordinate IDs.
	maxNames = 4096
)

// names turns IDs into selectors, those made of the ID itself and, where it
// has a name, those made of the name. Safe for concurrent use.
type names struct {
	idPrefix, namePrefix string
	lookup               func(id string) (string, error) // "" when there is no name

	mu     sync.RWMutex
	known  map[uint32]named
	flight singleflight.Group
}

// named is what is known of one ID.
type named struct {
	selectors []cache.Selector // the one with the ID first
	until     time.Time
}

func newNames(idPrefix, namePrefix string, lookup func(string) (string, error)) *names {
	return &names{idPrefix: idPrefix, namePrefix: namePrefix, lookup: lookup, known: make(map[uint32]named)}
}

// add appends the selectors of an ID to out. When the user database fails, the
// last answer counts for as long as it is remembered; without one it is an
// error, because an entry may depend on the name.
func (n *names) add(out []cache.Selector, id uint32) ([]cache.Selector, error) {
	n.mu.RLock()
	have, ok := n.known[id]
	n.mu.RUnlock()
	if ok && time.Now().Before(have.until) {
		return append(out, have.selectors...), nil
	}
	v, err, _ := n.flight.Do(formatID(id), func() (any, error) {
		text := formatID(id)
		name, err := n.lookup(text)
		if err != nil {
			return nil, err
		}
		fresh := named{
			selectors: []cache.Selector{{Type: Name, Value: n.idPrefix + text}},
			until:     time.Now().Add(namesTTL),
		}
		if name != "" {
			fresh.selectors = append(fresh.selectors, cache.Selector{Type: Name, Value: n.namePrefix + name})
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.known) >= maxNames {
			clear(n.known)
		}
		n.known[id] = fresh
		return fresh, nil
	})
	switch {
	case err == nil:
		have = v.(named)
	case !ok:
		return nil, fmt.Errorf("name of %s%d: %w", n.idPrefix, id, err)
	}
	return append(out, have.selectors...), nil
}

func lookupUser(id string) (string, error) {
	u, err := user.LookupId(id)
	if err != nil {
		return "", unlessNameless(err)
	}
	return u.Username, nil
}

func lookupGroup(id string) (string, error) {
	g, err := user.LookupGroupId(id)
	if err != nil {
		return "", unlessNameless(err)
	}
	return g.Name, nil
}

// unlessNameless returns nil when err says that the ID has no name. In an image
// of the agent alone there is no /etc/passwd, and so nobody has one.
func unlessNameless(err error) error {
	var noUser user.UnknownUserIdError
	var noGroup user.UnknownGroupIdError
	if errors.As(err, &noUser) || errors.As(err, &noGroup) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

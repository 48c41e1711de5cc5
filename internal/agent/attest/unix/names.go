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
	id, name string // values of selectors; name is empty when there is none
	until    time.Time
}

func newNames(idPrefix, namePrefix string, lookup func(string) (string, error)) *names {
	return &names{idPrefix: idPrefix, namePrefix: namePrefix, lookup: lookup, known: make(map[uint32]named)}
}

// add adds the selectors of an ID. When the user database fails, the last answer
// counts for as long as it is remembered. Without one the name is missing, and an
// entry may need it.
func (n *names) add(f *found, id uint32) {
	n.mu.RLock()
	have, ok := n.known[id]
	n.mu.RUnlock()
	if !ok || !time.Now().Before(have.until) {
		fresh, err := n.ask(id)
		switch {
		case err == nil:
			have = fresh
		case !ok:
			have.id = n.idPrefix + formatID(id)
			f.missing(fmt.Errorf("name of %s: %w", have.id, err))
		}
	}
	f.add(have.id)
	if have.name != "" {
		f.add(have.name)
	}
}

func (n *names) ask(id uint32) (named, error) {
	text := formatID(id)
	v, err, _ := n.flight.Do(text, func() (any, error) {
		name, err := n.lookup(text)
		if err != nil {
			return named{}, err
		}
		fresh := named{id: n.idPrefix + text, until: time.Now().Add(namesTTL)}
		if name != "" {
			fresh.name = n.namePrefix + name
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.known) >= maxNames {
			clear(n.known)
		}
		n.known[id] = fresh
		return fresh, nil
	})
	return v.(named), err
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

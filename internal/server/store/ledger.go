package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/ledger"
)

// rowKey returns authority, agent and entry, separated by zero bytes. The entry ID, which
// is last, may contain any byte.
func rowKey(r ledger.Row) ([]byte, error) {
	if strings.Contains(r.Authority, "\x00") || strings.Contains(r.Agent, "\x00") {
		return nil, errors.New("a zero byte in an authority or agent")
	}
	key := fmt.Appendf(make([]byte, 0, len(r.Authority)+len(r.Agent)+len(r.Entry)+2), "%s\x00%s\x00%s", r.Authority, r.Agent, r.Entry)
	return key, checkKey(key)
}

func putRow(r ledger.Row) (op, error) {
	key, err := rowKey(r)
	return op{rows, key, packTime(key, r.NotAfter)}, err
}

// SaveLedger implements ledger.Storage.
func (d *Deployment) SaveLedger(ctx context.Context, c ledger.Change) error {
	ops := make([]op, 0, len(c.Put)+len(c.Gone)+len(c.JWT))
	for _, r := range c.Put {
		o, err := putRow(r)
		if err != nil {
			return fmt.Errorf("save ledger: %w", err)
		}
		ops = append(ops, o)
	}
	for _, r := range c.Gone {
		key, err := rowKey(r)
		if err != nil {
			return fmt.Errorf("save ledger: %w", err)
		}
		ops = append(ops, op{rows, key, nil})
	}
	for id, at := range c.JWT {
		key := []byte(id)
		if err := checkKey(key); err != nil {
			return fmt.Errorf("save ledger: JWT key: %w", err)
		}
		o := op{bucket: jwt, key: key}
		if !at.IsZero() {
			o.value = packTime(key, at)
		}
		ops = append(ops, o)
	}
	return d.write(ctx, len(ops), func(state) ([]op, error) { return ops, nil })
}

// LoadLedger implements ledger.Storage. row must not use the store.
func (d *Deployment) LoadLedger(ctx context.Context, row func(ledger.Row)) (map[string]time.Time, error) {
	latest := make(map[string]time.Time)
	err := d.read(ctx, func(b *bbolt.Bucket) error {
		// Neighbors have the same authority, and most of them the same agent.
		var r ledger.Row
		err := b.Bucket([]byte(rows)).ForEach(func(k, v []byte) (err error) {
			authority, rest, _ := bytes.Cut(k, []byte{0})
			agent, entry, ok := bytes.Cut(rest, []byte{0})
			if !ok {
				return fmt.Errorf("%w: %q is not a key of the ledger", ErrDamaged, k)
			}
			r.Authority, r.Agent, r.Entry = reuse(r.Authority, authority), reuse(r.Agent, agent), string(entry)
			if r.NotAfter, err = unpackTime(k, v); err != nil {
				return err
			}
			row(r)
			return nil
		})
		if err != nil {
			return err
		}
		return b.Bucket([]byte(jwt)).ForEach(func(k, v []byte) (err error) {
			latest[string(k)], err = unpackTime(k, v)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return latest, nil
}

// reuse returns b as a string; before itself, without an allocation, if it is equal.
func reuse(before string, b []byte) string {
	if before == string(b) {
		return before
	}
	return string(b)
}

var _ ledger.Storage = (*Deployment)(nil)

package store

import (
	"bytes"
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// Agent implements spireapi.Storage.
func (d *Deployment) Agent(ctx context.Context, id spiffeid.ID) (*spireapi.Agent, error) {
	var a *spireapi.Agent
	err := d.read(ctx, func(b *bbolt.Bucket) (err error) {
		key := []byte(id.String())
		a, err = decodeAgent(key, b.Bucket([]byte(agents)).Get(key))
		return err
	})
	return a, err
}

// Agents implements spireapi.Storage.
func (d *Deployment) Agents(ctx context.Context) ([]spireapi.Agent, error) {
	return readAll(ctx, d, agents, decode[spireapi.Agent])
}

// UpdateAgent implements spireapi.Storage. change must not use the store.
func (d *Deployment) UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error), records ...*spireapi.AuditRecord) (*spireapi.Agent, error) {
	var next *spireapi.Agent
	err := d.write(ctx, 1, func(v state) (ops []op, err error) {
		if ops, next, err = changeAgent(v, id, change); err != nil {
			return nil, err
		}
		encoded, err := encodeServerAudit(records) // change may have completed them
		if err != nil {
			return nil, err
		}
		return d.audited(v, ops, encoded)
	})
	if err != nil {
		return nil, err
	}
	return next, nil
}

// Admit implements spireapi.Storage. Change and Row must not use the store.
func (d *Deployment) Admit(ctx context.Context, a spireapi.Admission) error {
	return d.write(ctx, 3, func(v state) ([]op, error) {
		ops, _, err := changeAgent(v, a.ID, a.Change)
		if err != nil {
			return nil, err
		}
		if a.Token != "" {
			o, err := d.spend(v, a.Token, a.SpentAt)
			if err != nil {
				return nil, err
			}
			ops = append(ops, o)
		}
		o, err := putRow(a.Row())
		return append(ops, o), err
	})
}

// changeAgent plans a change of an agent and returns the changed agent.
func changeAgent(v state, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error)) (ops []op, next *spireapi.Agent, err error) {
	key := []byte(id.String())
	stored, err := v.get(agents, key)
	if err != nil {
		return nil, nil, err
	}
	old, err := decodeAgent(key, stored)
	if err != nil {
		return nil, nil, err
	}
	a, err := change(old)
	switch {
	case err != nil:
		return nil, nil, err
	case a == nil && stored == nil:
		return nil, nil, nil
	case a == nil:
		return []op{{agents, key, nil}}, nil, nil
	}
	copied := *a
	o, err := put(agents, key, &copied)
	if err != nil {
		return nil, nil, err
	}
	if bytes.Equal(o.value, stored) {
		return nil, &copied, nil
	}
	return []op{o}, &copied, nil
}

func decodeAgent(key, value []byte) (*spireapi.Agent, error) {
	if value == nil {
		return nil, nil
	}
	a, err := decode[spireapi.Agent](key, value)
	if err != nil {
		return nil, err
	}
	return &a, nil
}

// Entries implements spireapi.Storage.
func (d *Deployment) Entries(ctx context.Context) ([]spireapi.StoredEntry, error) {
	return readAll(ctx, d, entries, decode[spireapi.StoredEntry])
}

// PutEntries implements spireapi.Storage.
func (d *Deployment) PutEntries(ctx context.Context, stored []spireapi.StoredEntry, gone []string, records ...*spireapi.AuditRecord) error {
	ops := make([]op, 0, len(stored)+len(gone)+len(records))
	for _, e := range stored {
		o, err := put(entries, []byte(e.ID), e)
		if err != nil {
			return fmt.Errorf("put entry: %w", err)
		}
		ops = append(ops, o)
	}
	for _, id := range gone {
		ops = append(ops, op{entries, []byte(id), nil})
	}
	encoded, err := encodeServerAudit(records)
	if err != nil {
		return fmt.Errorf("put entries: %w", err)
	}
	return d.write(ctx, len(ops)+len(encoded), func(v state) ([]op, error) { return d.audited(v, ops, encoded) })
}

// readAll decodes all values of a bucket.
func readAll[T any](ctx context.Context, d *Deployment, bucket string, decode func(key, value []byte) (T, error)) ([]T, error) {
	var list []T
	err := d.read(ctx, func(b *bbolt.Bucket) error {
		return b.Bucket([]byte(bucket)).ForEach(func(k, value []byte) error {
			v, err := decode(k, value)
			list = append(list, v)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

var _ spireapi.Storage = (*Deployment)(nil)

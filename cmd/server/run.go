package main

import (
	"errors"

	"github.com/renewd/renewd/internal/seal"
	"github.com/renewd/renewd/internal/store"
)

// exitStore is the exit status of a server whose store is damaged or was sealed
// with another key: a restart would end the same way.
const exitStore = 3

func hopeless(err error) bool {
	return errors.Is(err, store.ErrDamaged) || errors.Is(err, seal.ErrWrongKey)
}

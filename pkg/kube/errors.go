package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// kindOf maps an error of the API, or of the way to it, to a kind.
func kindOf(err error) fault.Kind {
	var kind *fault.Error
	var network net.Error // all that net/http returns is one
	switch {
	case errors.As(err, &kind):
		return kind.Kind
	case errors.Is(err, context.Canceled):
		return fault.Canceled
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fault.Permission
	// Not from Kubernetes but, say, from a proxy: its "404" tells of no object.
	case apierrors.IsUnexpectedServerError(err):
		return fault.Unavailable
	case apierrors.IsNotFound(err):
		return fault.NotFound
	case apierrors.IsAlreadyExists(err):
		return fault.Exists
	case apierrors.IsConflict(err):
		return fault.Conflict
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fault.Invalid
	case apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsTooManyRequests(err),
		apierrors.IsServiceUnavailable(err), apierrors.IsInternalError(err), // such as an etcd that has no leader
		errors.Is(err, context.DeadlineExceeded), errors.As(err, &network),
		errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fault.Unavailable
	}
	return fault.Internal
}

// failed says what could not be done, why, and what helps.
func failed(err error, format string, args ...any) error {
	what, kind := fmt.Sprintf(format, args...), kindOf(err)
	switch kind {
	case fault.Permission:
		return fault.New(kind, "%s: %w: check the RBAC rules of Quarry's own ServiceAccount", what, err)
	case fault.Unavailable:
		return fault.New(kind, "%s: the Kubernetes API cannot be reached or does not answer: %w", what, err)
	}
	return fault.New(kind, "%s: %w", what, err)
}

// filled wants a value for every field: name, value, name, value...
func filled(fields ...string) error {
	for i := 0; i < len(fields); i += 2 {
		if fields[i+1] == "" {
			return fault.New(fault.Invalid, "%s: it must not be empty", fields[i])
		}
	}
	return nil
}

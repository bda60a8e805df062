"""Registration: a user exists once their credential does; and the sweep that restarts what was interrupted."""

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy, SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ActivityError, ApplicationError, WorkflowAlreadyStartedError, is_cancelled_exception
from temporalio.workflow import ParentClosePolicy

with workflow.unsafe.imports_passed_through():
    from domain.contracts.registration import (
        COMPLETE_REGISTRATION,
        CREATE_CREDENTIALS,
        FAIL_REGISTRATION,
        REGISTRATION_ATTEMPTS_MAX,
        REGISTRATION_RESUMER,
        STALLED_REGISTRATIONS,
        USER_REGISTRATION,
        FailedRegistration,
        Registration,
        StalledRegistrations,
        registration_workflow_id,
    )

USER_ID = SearchAttributeKey.for_keyword("UserId")
STEP_TIMEOUT = timedelta(seconds=10)
# The credential store may be away for some minutes; then the registration fails and operators are told.
CREATE_RETRY = RetryPolicy(
    initial_interval=timedelta(milliseconds=500),
    maximum_interval=timedelta(seconds=15),
    maximum_attempts=REGISTRATION_ATTEMPTS_MAX,
)
# Steps that only write down what is already so: tried until they succeed.
RECORD_RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=15))


@workflow.defn(name=USER_REGISTRATION)
class UserRegistrationWorkflow:
    """Creates the credential, then activates the user; gives up after `REGISTRATION_ATTEMPTS_MAX` attempts."""

    @workflow.run
    async def run(self, registration: Registration) -> None:
        """Raises ApplicationError REGISTRATION_FAILED when the credential could not be created."""
        workflow.set_current_details(f"Creates the credential, in up to {REGISTRATION_ATTEMPTS_MAX} attempts")
        try:
            await workflow.execute_activity(
                CREATE_CREDENTIALS,
                registration,
                start_to_close_timeout=STEP_TIMEOUT,
                retry_policy=CREATE_RETRY,
                summary=f"Credential of user {registration.user_id}",
            )
        except ActivityError as error:
            # Cancelled by an operator: the row stays PREPARE, and the sweep takes it up again.
            if is_cancelled_exception(error):
                raise
            await self._give_up(FailedRegistration(registration.user_id, str(error.cause)))
        workflow.set_current_details("Makes the user active")
        await workflow.execute_activity(
            COMPLETE_REGISTRATION,
            registration,
            start_to_close_timeout=STEP_TIMEOUT,
            retry_policy=RECORD_RETRY,
            summary="User becomes ACTIVE",
        )
        workflow.set_current_details("The user is active")

    async def _give_up(self, failed: FailedRegistration) -> None:
        workflow.set_current_details(f"Failed: {failed.error}. Reset this workflow to try again.")
        await workflow.execute_activity(
            FAIL_REGISTRATION,
            failed,
            start_to_close_timeout=STEP_TIMEOUT,
            retry_policy=RECORD_RETRY,
            summary="User becomes FAILED, operators are told",
        )
        raise ApplicationError(failed.error, type="REGISTRATION_FAILED", non_retryable=True)


@workflow.defn(name=REGISTRATION_RESUMER)
class RegistrationResumerWorkflow:
    """One sweep: registrations that wait although no workflow works on them get one again."""

    @workflow.run
    async def run(self) -> list[int]:
        """The users whose registration was started again."""
        workflow.set_current_details("Looks for registrations that wait for too long")
        stalled = await workflow.execute_activity(
            STALLED_REGISTRATIONS,
            result_type=StalledRegistrations,
            start_to_close_timeout=STEP_TIMEOUT,
            schedule_to_close_timeout=timedelta(seconds=50),
            retry_policy=RECORD_RETRY,
            summary="Registrations that wait for too long",
        )
        workflow.set_current_details(f"Starts up to {len(stalled.user_ids)} registrations again")
        resumed = await asyncio.gather(*map(self._resume, stalled.user_ids))
        workflow.set_current_details(f"{sum(resumed)} registrations were started again")
        return [user_id for user_id, started in zip(stalled.user_ids, resumed, strict=True) if started]

    async def _resume(self, user_id: int) -> bool:
        try:
            await workflow.start_child_workflow(
                USER_REGISTRATION,
                Registration(user_id),
                id=registration_workflow_id(user_id),
                parent_close_policy=ParentClosePolicy.ABANDON,
                static_summary=f"Registers user {user_id} (resumed)",
                search_attributes=TypedSearchAttributes([SearchAttributePair(USER_ID, str(user_id))]),
            )
        except WorkflowAlreadyStartedError:
            return False
        return True


WORKFLOWS = [UserRegistrationWorkflow, RegistrationResumerWorkflow]

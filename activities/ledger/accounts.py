"""The exchange's own accounts in the ledger."""

FEES = "exchange:fees"
INSURANCE_FUND = "exchange:insurance_fund"
CLEARING = "exchange:clearing"
DEPOSITS = "external:deposits"
FUNDING = "exchange:funding"
ROUNDING = "exchange:rounding"
# What the insurance fund could not pay: below zero as long as nobody has made it good.
SHORTFALL = "exchange:shortfall"
